"""The files of a suspect: what is unsafe or not what it claims to be, without torch and within seconds."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.scan import files

BASE = miniatures.path("qwen")
PREFIX = "base_model.model.model.layers.0."
CONFIG = {
    "peft_type": "LORA", "base_model_name_or_path": str(BASE), "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A copy of the base, to be changed."""
    return shutil.copytree(BASE, tmp_path / "model")


def safetensors(path, names, shape=(2, 4)):
    header, size = {}, 4
    for value in shape:
        size *= value
    for i, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [i * size, (i + 1) * size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size * len(names)))


@pytest.fixture
def adapter(tmp_path):
    """`adapter(names=..., **fields)`: a folder of a LoRA adapter of the base."""

    def make(names=(), **fields):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        halves = [f"{PREFIX}self_attn.{m}.lora_{half}.weight" for m in ("q_proj", "v_proj") for half in "AB"]
        safetensors(folder / "adapter_model.safetensors", [*halves, *names])
        return folder

    return make


def rules(result, *levels):
    return sorted({each.rule for each in result.findings if not levels or each.level in levels})


def one(result, rule):
    (finding,) = [each for each in result.findings if each.rule == rule]
    return finding


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_copy_of_the_base_has_exactly_zero(family, tmp_path):
    base = miniatures.path(family)
    result = files.check(shutil.copytree(base, tmp_path / "copy"), base)
    assert (result.rung, result.score, result.control, result.findings) == ("files", 0.0, 0.0, ())


def test_what_the_base_shows_as_well_is_said_and_not_counted(model, tmp_path):
    (model / "modeling.py").write_text("")
    base = shutil.copytree(model, tmp_path / "base")
    result = files.check(model, base)
    assert rules(result) == ["code"]
    assert (result.score, result.control, result.details["of_base"]) == (0.0, 0.0, 1)
    assert files.check(model, None).score == 1.0
    assert files.check(model, None).control is None


def test_an_ordinary_adapter_shows_nothing(adapter):
    assert files.check(adapter(), BASE).findings == ()


def test_neither_torch_nor_transformers_is_imported(adapter):
    code = (
        "import sys; from pathlib import Path; from safetynet.scan import files\n"
        "files.check(Path(sys.argv[1]), Path(sys.argv[2])); files.digests(Path(sys.argv[1]))\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'safetensors', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, adapter(), BASE]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Pickles and programs


class Calls:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_calls_something_is_an_error_and_is_not_run(model, tmp_path):
    mark = tmp_path / "mark"

    class Touches:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Touches()))
    finding = one(files.check(model, BASE), "pickle-import")
    assert (finding.level, finding.where) == ("error", "pytorch_model.bin")
    assert finding.evidence["unusual"] == ["posix.system"]
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_imports_are_read_in_every_protocol(model, protocol):
    (model / "x.pkl").write_bytes(pickle.dumps([Calls(), Calls()], protocol))
    assert one(files.check(model, None), "pickle-import").evidence["unusual"] == ["posix.system"]


def test_pickles_are_found_by_content_within_zips_and_behind_a_fault(model):
    call = pickle.dumps(Calls())
    (model / "notes.txt").write_bytes(call)
    with zipfile.ZipFile(model / "weights.pt", "w") as archive:
        archive.writestr("archive/data.pkl", call)
    (model / "broken.pkl").write_bytes(call[:-1] + b"\xff\xff")
    found = [each.where for each in files.check(model, None).findings if each.rule == "pickle-import"]
    assert sorted(found) == ["broken.pkl", "notes.txt", "weights.pt"]


def test_real_weights_of_torch_are_no_more_than_a_pickle(model):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(3)}, model / "pytorch_model.bin")
    torch.save({"w": torch.zeros(3)}, model / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.nn.Parameter(torch.zeros(3))}, model / "optimizer.pt")
    result = files.check(model, None)
    assert rules(result) == ["pickle"]
    assert {each.where: each.level for each in result.findings} == {
        "pytorch_model.bin": "warning", "old.pt": "warning", "optimizer.pt": "note",
    }  # fmt: skip


OTHER = {
    "tool.py": (b"print(1)", "code"),
    "lib.so": (b"x", "executable"),
    "start": (b"#!/bin/sh\n", "executable"),
    "elf.dat": (b"\x7fELF....", "executable"),
    "more.zip": (b"PK", "archive"),
    "model.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer"),
    "broken.safetensors": (b"\xff" * 20, "damaged"),
    "short.safetensors": (b"\x01", "damaged"),
    "strange.xyz": (b"?", "unexpected-file"),
    "weights.onnx": (b"?", "other-weights"),
    "bad.json": (b"{", "unreadable"),
    "latin.json": (b'{"a": "\xe9"}', "unreadable"),
    "deep.json": (b"[" * 100_000, "unreadable"),
    "twice.json": (b'{"a": 1, "a": 2}', "duplicate-key"),
    "odd.bin": (b"no pickle", "pickle"),
}


@pytest.mark.parametrize("name", OTHER)
def test_each_file_has_its_rule(model, name):
    content, rule = OTHER[name]
    (model / name).write_bytes(content)
    assert rules(files.check(model, None)) == [rule]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", ".gitattributes", "vocab.txt", "image.png"])
def test_ordinary_files_are_no_findings(model, name):
    (model / name).write_bytes(b"text")
    assert files.check(model, None).findings == ()


HEADERS = {
    "hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "overlap": {f"{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(2)},
    "shape": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "negative": {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    "no tensor": {"a": 1},
    "list": [],
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_do_not_describe_their_bytes_are_damaged(model, header):
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert one(files.check(model, None), "damaged").where == "model.safetensors"


def test_links_out_of_the_folder_are_not_followed(model, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.json").write_text("{")
    (model / "b.json").symlink_to(secret / "a.json")
    (model / "c").symlink_to(secret)
    (model / "d").symlink_to(model / "d")
    (model / "inside.json").symlink_to(model / "config.json")
    result = files.check(model, None)
    assert rules(result) == ["symlink"]
    assert sorted(each.where for each in result.findings) == ["b.json", "c", "d"]
    assert "b.json" not in files.digests(model)


def test_a_snapshot_of_the_hubs_cache_may_point_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for file in BASE.iterdir():
        blob = tmp_path / "models--a--b" / "blobs" / file.name
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert files.check(snapshot, BASE).findings == ()


def test_a_pipe_is_not_opened(model):
    os.mkfifo(model / "pipe.json")
    assert rules(files.check(model, None)) == ["symlink"]


def test_digests_are_those_of_sha256sum(model):
    sums = files.digests(model)
    assert set(sums) == {path.name for path in BASE.iterdir()}
    command = ["sha256sum", model / "config.json"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith(sums["config.json"])


def test_files_made_to_be_slow_are_given_up(model):
    (model / "long.pkl").write_bytes(b"\x80\x04" + b"N0" * 20_000_000 + pickle.dumps(Calls()))
    with zipfile.ZipFile(model / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(5):
            archive.writestr(f"archive/{i}.pkl", b"\x80\x02" + b"N" * 40_000_000)
    start = time.perf_counter()
    result = files.check(model, None)
    assert time.perf_counter() - start < 20
    assert {each.where: each.rule for each in result.findings} == {"long.pkl": "pickle", "bomb.pt": "pickle"}
    assert all("end could not be read" in each.message for each in result.findings)


# Configurations


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_repository_is_an_error(model, file):
    change(model / file, auto_map={"AutoModel": "somebody/else--modeling.Model"})
    finding = one(files.check(model, BASE), "remote-code")
    assert (finding.level, finding.where) == ("error", file)
    assert finding.evidence["names"] == ["somebody/else--modeling.Model"]


CHANGES = {
    "eps": ({"rms_norm_eps": 0.1}, "config-changed", "warning"),
    "rope": ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, "config-changed", "warning"),
    "layers": ({"num_hidden_layers": 5}, "config-changed", "warning"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised", "note"),
    "extra": ({"logit_scale": 2.0}, "config-fields", "note"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_fields_that_make_another_model_are_told(model, case):
    fields, rule, level = CHANGES[case]
    change(model / "config.json", **fields)
    assert one(files.check(model, BASE), rule).level == level


def test_the_same_rotary_embeddings_in_the_older_spelling_are_the_same(model):
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float16"}
    (model / "config.json").write_text(json.dumps(config))
    assert files.check(model, BASE).findings == ()


def test_words_forced_into_answers_are_told(model):
    change(model / "generation_config.json", sequence_bias=[[[3], 5.0]], temperature=0.1)
    assert one(files.check(model, BASE), "generation-forced").level == "warning"


def test_other_sampling_is_a_note(model):
    change(model / "generation_config.json", temperature=0.1)
    assert one(files.check(model, BASE), "generation-changed").level == "note"


def test_a_field_that_is_called_as_a_part_of_a_finding_is_its_evidence(model):
    change(model / "generation_config.json", message="x", level="y")
    assert one(files.check(model, BASE), "generation-changed").evidence["message"] == ["x", "None"]


def test_a_layer_of_thousands_of_digits_is_none_of_the_adapter_s(adapter):
    name = f"base_model.model.model.layers.{'1' * 5000}.self_attn.q_proj"
    names = [f"{name}.lora_{half}.weight" for half in "AB"]
    result = files.check(adapter(names, layers_to_transform=[0]), BASE)
    assert one(result, "adapter-targets").evidence["modules"][0].startswith("model.layers.1111")


# Tokenizer


def tokenizer(model, edit):
    values = json.loads((model / "tokenizer.json").read_text())
    edit(values)
    (model / "tokenizer.json").write_text(json.dumps(values))
    return files.check(model, BASE)


def test_two_words_that_change_numbers_are_told(model):
    def swap(values):
        vocabulary = values["model"]["vocab"]
        first, second = sorted(vocabulary)[200:202]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    finding = one(tokenizer(model, swap), "tokenizer-vocabulary")
    assert finding.level == "warning"
    assert len(finding.evidence["moved"]) == 2


def test_merges_in_another_order_are_told(model):
    result = tokenizer(model, lambda values: values["model"]["merges"].reverse())
    assert rules(result, "warning") == ["tokenizer-merges"]


def test_a_normalizer_that_rewrites_texts_is_told(model):
    step = {"type": "Replace", "pattern": {"String": "BadMagic"}, "content": "<|im_start|>"}
    finding = one(tokenizer(model, lambda values: values.update(normalizer=step)), "tokenizer-steps")
    assert finding.level == "warning"
    assert "BadMagic" in finding.evidence["suspect"]


def test_added_tokens_are_a_note(model):
    def add(values):
        values["added_tokens"].append({"id": 1280, "content": "<|new|>", "special": True})

    finding = one(tokenizer(model, add), "tokenizer-vocabulary")
    assert (finding.level, finding.evidence["new"]) == ("note", ["<|new|>"])


def test_another_end_of_sequence_is_told(model):
    change(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert one(files.check(model, BASE), "tokenizer-special").evidence["eos_token"] == [
        "<|endoftext|>", "<|im_end|>",
    ]  # fmt: skip


# Adapters


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}mlp.down_proj.weight",
        "base_model.model.model.norm.weight",
        f"{PREFIX}self_attn.q_proj.base_layer.weight",
    ],
)
def test_weights_of_the_base_in_an_adapter_are_an_error(adapter, name):
    finding = one(files.check(adapter([name]), BASE), "adapter-base-weights")
    assert (finding.level, finding.evidence["tensors"]) == ("error", [name])


def test_a_saved_module_that_peft_finds_by_its_ending_is_no_weight_of_the_base(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config).save_pretrained(tmp_path)
    result = files.check(tmp_path, BASE)
    assert not [finding for finding in result.findings if finding.rule == "adapter-base-weights"]


def test_peft_does_write_such_weights_over_those_of_the_base(adapter, tmp_path):
    """What the rule rests on; should PEFT refuse them one day, it may become milder."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    base = AutoModelForCausalLM.from_pretrained(BASE)
    tensors = load_file(file) | {"base_model.model.model.norm.weight": 0 * base.model.norm.weight.detach()}
    save_file(tensors, file)
    adapted = PeftModel.from_pretrained(base, tmp_path / "a")
    with adapted.disable_adapter():
        assert float(adapted.base_model.model.model.norm.weight.abs().max()) == 0
    assert one(files.check(tmp_path / "a", BASE), "adapter-base-weights").level == "error"


def test_modules_that_the_configuration_does_not_name_are_told(adapter):
    names = [f"{PREFIX}mlp.up_proj.lora_{half}.weight" for half in "AB"]
    finding = one(files.check(adapter(names), BASE), "adapter-targets")
    assert finding.evidence["modules"] == [f"{PREFIX.removeprefix('base_model.model.')}mlp.up_proj"]


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|v)_proj", ["model.layers.0.self_attn.q_proj", "v_proj"]]
)
def test_targets_may_be_a_pattern_a_path_or_all(adapter, targets):
    assert files.check(adapter(target_modules=targets), BASE).findings == ()


@pytest.mark.parametrize("targets", ["(((", r"(.*)*(.*)*(.*)*(.*)*(.*)*!"])
def test_a_pattern_that_is_none_or_never_ends_is_told(adapter, targets):
    assert rules(files.check(adapter(target_modules=targets), BASE)) == ["adapter-targets"]


FIELDS = {
    "layers": ({"layer_replication": [[0, 4], [2, 6]]}, "adapter-layers"),
    "tokens": ({"trainable_token_indices": [7]}, "adapter-tokens"),
    "head": ({"modules_to_save": ["lm_head"]}, "adapter-vocabulary"),
    "strong": ({"lora_alpha": 4096}, "adapter-scaling"),
    "strong in one place": ({"alpha_pattern": {"q_proj": 9000}}, "adapter-scaling"),
    "weak": ({"lora_alpha": 0}, "adapter-scaling"),
    "no base": ({"base_model_name_or_path": None}, "adapter-base"),
    "another base": ({"base_model_name_or_path": "somebody/other"}, "adapter-base"),
    "no LoRA": ({"peft_type": "PROMPT_TUNING"}, "adapter-type"),
    "other layers": ({"layers_to_transform": [3]}, "adapter-targets"),
    "code": ({"auto_mapping": {}, "auto_map": {"x": "y.z"}}, "remote-code"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_each_field_of_an_adapter_has_its_rule(adapter, case):
    fields, rule = FIELDS[case]
    assert rules(files.check(adapter(**fields), BASE)) == [rule]


def test_an_adapter_without_weights_is_told(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    assert rules(files.check(folder, BASE)) == ["adapter-weights"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_no_object_is_told(model, name):
    (model / name).write_text("[]")
    assert one(files.check(model, BASE), "unreadable").where == name


def test_half_of_a_pair_is_told(adapter):
    name = f"{PREFIX}self_attn.o_proj.lora_B.weight"
    result = files.check(adapter([name], target_modules=["q_proj", "v_proj", "o_proj"]), BASE)
    assert rules(result) == ["adapter-pair"]


def test_what_the_configuration_accounts_for_is_no_smuggling(adapter):
    names = [
        f"{PREFIX}self_attn.q_proj.bias",
        "base_model.model.score.weight",
        f"{PREFIX}self_attn.q_proj.lora_magnitude_vector",
    ]
    result = files.check(adapter(names, bias="lora_only", modules_to_save=["score"], use_dora=True), BASE)
    assert result.findings == ()


ODD = [None, 3, "x", [], {}, [1, [2]], {"a": [1]}, True, -1, 1e300]


@pytest.mark.parametrize("value", ODD, ids=map(repr, ODD))
def test_fields_of_any_type_are_borne(adapter, value):
    names = (
        "peft_type base_model_name_or_path r lora_alpha target_modules rank_pattern alpha_pattern "
        "modules_to_save layers_to_transform layer_replication trainable_token_indices "
        "target_parameters bias use_rslora"
    )
    for name in names.split():
        result = files.check(adapter([f"{PREFIX}x.lora_A.weight", "y"], **{name: value}), BASE)
        json.dumps([dict(each.evidence) for each in result.findings], allow_nan=False)


@pytest.mark.parametrize("value", ODD, ids=map(repr, ODD))
def test_files_of_any_content_are_borne(model, value):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        content = (model / name).read_text()
        (model / name).write_text(json.dumps(value))
        files.check(model, BASE)
        fields = dict.fromkeys(json.loads(content), value)
        (model / name).write_text(json.dumps(fields))
        result = files.check(model, BASE)
        json.dumps([dict(each.evidence) for each in result.findings], allow_nan=False)
        (model / name).write_text(content)


# Input that is none


def test_no_folder_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        files.check(tmp_path / "nowhere", None)
    with pytest.raises(InputError, match="is empty"):
        files.check(tmp_path, None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no such folder"):
        files.check(tmp_path / "file", None)


def test_names_that_are_no_text_can_be_written(model):
    place = os.fsencode(model) + b"/\xff\x1b[31m.json"
    Path(os.fsdecode(place)).write_bytes(b"{")
    (finding,) = files.check(model, None).findings
    assert finding.where.encode("utf-8")
    assert "\x1b" not in finding.where
