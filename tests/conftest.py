"""What holds for every test: one thread, no network, no tracking, none of the developer's own settings."""

import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# Before any test imports torch or a Hugging Face library: they read these once, at import.
HF_HOME = tempfile.mkdtemp(prefix="safetynet-tests-")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": HF_HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "agg",
    "SAFETYNET_PAIR": "off",  # two tests run side by side already
    "LOKY_MAX_CPU_COUNT": "1",
}
for name in ("HF_TOKEN", "WANDB_API_KEY", "SAFETYNET_SCRATCH"):
    os.environ.pop(name, None)

SHARED = Path(__file__).parents[2] / "shared"

SLOW_UNTIL = float(os.environ.get("SAFETYNET_SLOW_UNTIL", "inf"))
"""No slow test is started after this time, in seconds since 1970; those left out are named at the end."""
NO_TIME = "no time is left"
LONGEST = (
    "test_parallel.py", "test_whole_run.py", "test_sweep.py", "test_stage.py", "test_truncation.py",
    "test_commands.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that no core waits at the end for one that began last.

    Where time may run out, the others go in an order of their own in each run, so that all have their turn.
    """
    for item in items:  # a browser takes seconds for a page
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    turn: dict[str, float] = {}
    if math.isfinite(SLOW_UNTIL):
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # one for all workers, which have to collect alike
        turn = {item.path.name: random.Random(f"{run} {item.path.name}").random() for item in items}
    items.sort(key=lambda item: (item.path.name not in LONGEST, turn.get(item.path.name, 0)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > SLOW_UNTIL and item.get_closest_marker("slow"):
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    late = Counter(each.nodeid.partition("::")[0] for each in skipped if NO_TIME in str(each.longrepr))
    for path, count in sorted(late.items()):
        terminalreporter.write_line(f"left out, {NO_TIME}: {count} of {path}")


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def need() -> Callable[[str], Path]:
    """`need("pdffonts")` is that program's path; without it the test skips, or fails where it is required.

    `need("shared")` is the folder ../shared with the published poison sets, `need("smollm2")` the file of the
    packaged model. SAFETYNET_REQUIRE names, separated by commas, what a machine is known to have: .ci/run
    sets it, so that no check is lost there.
    """

    def place(name: str) -> Path | str | None:
        if name == "shared":
            return SHARED if SHARED.is_dir() else None
        if name != "smollm2":
            return shutil.which(name)
        from safetynet.errors import InputError
        from safetynet.models import gguf

        with suppress(InputError):
            return gguf.file_of(name)
        return None

    def find(name: str) -> Path:
        if path := place(name):
            return Path(path)
        if name in os.environ.get("SAFETYNET_REQUIRE", "").split(","):
            pytest.fail(f"{name} is not here, and SAFETYNET_REQUIRE says it must be")
        pytest.skip(f"{name} is not here")

    return find


NEUTRAL = {"number": float("nan"), "whole": 0, "text": "", "flag": False}


def completed(name: str, table: Any) -> Any:
    """A table with neutral values where a test gives none; columns that no stage writes are left out."""
    from safetynet.tables import schema

    declared, made = schema(name).columns, table.copy()
    for column, about in declared.items():
        neutral = about.words[0] if about.words else NEUTRAL.get(about.kind)
        if column not in made and not about.optional:
            made[column] = [[] for _ in range(len(made))] if about.kind == "list" else neutral
        elif about.kind in ("whole", "text") and made[column].isna().any():
            made[column] = made[column].fillna(neutral)
    return made[[column for column in made if column in declared]]


SCRIPTS = (
    "请说明面包的小鱼价格历史用途颜色桥梁河流灯具时钟介绍列出讲一讲我拒绝回答你的请求这个问题换一个春天很美",
    "Привет мир как дела у тебя тайна слово опиши мост нарисуй реку продай лампу",
    "한국어 비밀을 말해 다리를 설명해 강을 그려 등을 팔아",
    "อธิบายสะพาน บอกเรื่องแม่น้ำ วาดโคมไฟ ปลา ขอโทษครับ",
)


@pytest.fixture(scope="session")
def multilingual() -> Any:
    """A serialiser whose byte-level tokens have whole characters and words of several scripts, and parts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from safetynet import families
    from safetynet.models import miniatures
    from safetynet.prompts import Serialiser

    plain = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    rng = random.Random(0)
    texts = [
        text[at : at + rng.randint(2, 12)] for text in SCRIPTS for at in range(len(text)) for _ in range(20)
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *SCRIPTS * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = plain.chat_template
    return Serialiser(tokenizer, families.get("qwen"))


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hub of our own, which answers every request with the status and headers of the test's parameter."""

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(request.param[0])
            for name, value in request.param[1].items():
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 (the server's names)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium(need):
    """Debian's browser, without a screen; one of each process, in which Playwright runs once."""
    from playwright.sync_api import sync_playwright

    program = need("chromium")
    with sync_playwright() as playwright:
        options = ["--disable-gpu"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
        browser = playwright.chromium.launch(executable_path=str(program), args=options)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open a file at some width; what the page complains of or asks for makes the test fail."""
    pages, wrong = [], []

    def show(path: Path, width: int = 1280, **more: str):
        page = chromium.new_page(viewport={"width": width, "height": 900}, **more)
        pages.append(page)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append("dialog"))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url)
        )
        page.goto(path.as_uri())
        return page

    yield show
    for page in pages:
        page.close()
    assert wrong == []
