"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const read = (id) => ($(id) ? JSON.parse($(id).textContent) : null);
  const bdi = (text) => {
    const made = make("bdi", text);
    made.dir = "auto";
    return made;
  };

  /* A prompt in pieces: plain text nodes, whatever they hold. */
  const prompt = (pieces, into) => {
    into.replaceChildren();
    for (const [kind, text] of pieces) {
      if (kind === "who") into.append(make("span", text, "who"));
      else if (kind === "mark") {
        const marked = make("mark");
        marked.append(bdi(text));
        into.append(marked);
      } else into.append(bdi(text));
    }
  };

  /* The map of a single prompt. */
  const maps = read("map-data");
  if (maps) {
    const table = $("map-table");
    const signed = (value) => (Math.abs(value) < 0.05 ? "" : value.toFixed(1).replace("-", "−").replace("0.", "."));
    const words = { remove: "remove: the placebo's state into the prompt with trigger", induce: "induce: the trigger's state into the prompt with placebo" };
    const option = (into, value, text) => {
      const made = make("option", text);
      made.value = value;
      into.append(made);
    };
    maps.forEach((one, index) => {
      const plain = one.prompt.map(([kind, text]) => (kind === "who" ? " · " : text)).join("").replace(/^ · /, "");
      option($("map-prompt"), index, `${index + 1}. ${(plain || `group ${one.group}`).slice(0, 70)}`);
    });
    const look = (value) => (value === null ? "" : `d${Math.round(Math.min(Math.max((value + 1) / 2, 0), 1) * 40)}`);
    const tell = (one, row, column) => {
      const value = one.maps[$("map-direction").value][row][column];
      const said = value === null ? "not measured" : `effect ${value.toFixed(2).replace("-", "−")}`;
      $("map-read").replaceChildren(
        `Layer ${one.layers[row]}, token `, bdi(one.tokens[column]), ` (${one.roles[column]}): ${said}.`,
      );
    };
    const draw = () => {
      const one = maps[$("map-prompt").value];
      const direction = $("map-direction");
      if (direction.dataset.of !== Object.keys(one.maps).join()) {
        direction.replaceChildren();
        direction.dataset.of = Object.keys(one.maps).join();
        Object.keys(one.maps).forEach((key) => option(direction, key, words[key] || key));
      }
      prompt(one.prompt, $("map-text"));
      $("map-answers").replaceChildren(...one.answers.map(([role, text]) => {
        const line = make("div");
        line.append(make("dt", `answer, ${role}`), make("dd"));
        line.lastChild.append(bdi(text));
        return line;
      }));
      const inside = one.roles.map((role) => role === "trigger");
      const head = make("tr");
      head.append(make("th", "Layer"));
      head.firstChild.scope = "col";
      one.tokens.forEach((token, column) => {
        const cell = make("th", undefined, inside[column] ? "t" : "");
        cell.scope = "col";
        cell.append(make("span"));
        cell.firstChild.append(bdi(token));
        head.append(cell);
      });
      const body = make("tbody");
      one.layers.map((layer, row) => [layer, row]).reverse().forEach(([layer, row]) => {
        const line = make("tr");
        const title = make("th", String(layer));
        title.scope = "row";
        line.append(title);
        one.maps[direction.value][row].forEach((value, column) => {
          const cell = make("td", value === null ? "" : signed(value), look(value));
          if (inside[column] && !inside[column - 1]) cell.classList.add("first");
          if (inside[column] && !inside[column + 1]) cell.classList.add("end");
          cell.tabIndex = -1;
          cell.dataset.row = row;
          cell.dataset.column = column;
          line.append(cell);
        });
        body.append(line);
      });
      const top = make("thead");
      top.append(head);
      const caption = make("caption", "Effect by layer (rows) and token (columns)", "quiet");
      table.replaceChildren(caption, top, body);
      const start = inside.includes(true) ? inside.indexOf(true) : 0;
      const first = body.lastChild.children[start + 1];
      first.tabIndex = 0;
      table.parentElement.scrollLeft = first.offsetLeft - 90;
    };
    const cellOf = (event) => event.target.closest("td");
    ["pointerover", "focusin"].forEach((kind) => table.addEventListener(kind, (event) => {
      const cell = cellOf(event);
      if (cell) tell(maps[$("map-prompt").value], Number(cell.dataset.row), Number(cell.dataset.column));
    }));
    table.addEventListener("keydown", (event) => {
      const cell = cellOf(event);
      const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (!cell || !(event.key in moves)) return;
      const [dx, dy] = moves[event.key];
      const rows = [...cell.closest("tbody").children];
      const line = rows[rows.indexOf(cell.parentElement) + dy];
      const next = line && line.children[[...cell.parentElement.children].indexOf(cell) + dx];
      event.preventDefault();
      if (!next || next.tagName !== "TD") return;
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    $("map-prompt").addEventListener("change", draw);
    $("map-direction").addEventListener("change", draw);
    draw();
  }

  /* Prompts and answers, a page at a time. */
  const found = read("ex-data");
  if (found) {
    const PAGE = innerWidth < 700 ? 8 : 20;
    const text = (row) => row.prompt.filter(([kind]) => kind !== "who").map(([, one]) => one).join("");
    const columns = [
      ["Row", "c-row", (row) => row.row],
      ["Role", "c-role", (row) => `${row.role} ${row.variant}`],
      ["Prompt", "", text],
      ...found.models.map((model, index) => [model, "c-answer", (row) => row.answers[index][0]]),
    ];
    let sorted = { column: 0, down: false };
    let page = 0;
    const head = $("examples").querySelector("thead tr");
    const list = $("examples").querySelector("tbody");
    columns.forEach(([title, kind], index) => {
      const cell = make("th", undefined, kind);
      cell.scope = "col";
      const button = make("button", title);
      button.type = "button";
      button.addEventListener("click", () => {
        sorted = { column: index, down: sorted.column === index && !sorted.down };
        page = 0;
        fill();
      });
      cell.append(button);
      head.append(cell);
    });
    const kept = () => {
      const role = $("ex-role").value;
      const shown = $("ex-shown").value;
      const words = $("ex-search").value.toLowerCase();
      return found.rows.filter((row) =>
        (!role || row.role === role) && (!shown || row.answers[0][1] === (shown === "yes")) &&
        (!words || [text(row), ...row.answers.map(([one]) => one)].some((one) => one.toLowerCase().includes(words))));
    };
    const ordered = (rows) => {
      const key = columns[sorted.column][2];
      const side = sorted.down ? -1 : 1;
      return rows.map((row) => [key(row), row]).sort(([a], [b]) => (a < b ? -side : a > b ? side : 0)).map(([, row]) => row);
    };
    const line = (row) => {
      const made = make("tr");
      const number = make("th", String(row.row));
      number.scope = "row";
      number.dataset.label = "Row";
      const role = make("td", row.role);
      if (row.variant) {
        role.append(make("span", "", "variant"));
        role.lastChild.append(bdi(row.variant));
      }
      const asked = make("td", undefined, "model");
      prompt(row.prompt, asked);
      made.append(number, role, asked);
      row.answers.forEach(([said, shown], index) => {
        const cell = make("td", undefined, shown ? "answer model shown" : "answer model");
        cell.dataset.label = found.models[index];
        cell.append(bdi(said));
        if (shown) cell.append(make("span", " (shows the behaviour)", "quiet"));
        made.append(cell);
      });
      return made;
    };
    const fill = () => {
      const rows = ordered(kept());
      const pages = Math.max(1, Math.ceil(rows.length / PAGE));
      page = Math.min(page, pages - 1);
      list.replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map(line));
      [...head.children].forEach((cell, index) => {
        if (index === sorted.column) cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      });
      $("ex-page").textContent = `Page ${page + 1} of ${pages}, ${rows.length.toLocaleString("en")} rows`;
      $("ex-back").disabled = page === 0;
      $("ex-next").disabled = page === pages - 1;
    };
    $("ex-back").addEventListener("click", () => { page -= 1; fill(); });
    $("ex-next").addEventListener("click", () => { page += 1; fill(); });
    ["ex-role", "ex-shown", "ex-search"].forEach((id) => $(id).addEventListener("input", () => { page = 0; fill(); }));
    document.querySelectorAll("form.pick").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
    fill();
  }
})();
