"""Weights on their way into a model: who decides, what is changed, what does not fit, and how much memory it takes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgevlm.core.errors import ConfigError, IntegrityError, UsageError
from edgevlm.families.family import NOT_NEEDED, Family, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.families.native import FAMILY, native_config
from edgevlm.families.tensors import INDEX, WEIGHTS, read_header, read_headers
from edgevlm.models.checkpoint import load_model, save_native
from edgevlm.models.misfits import name_in_file
from edgevlm.models.vlm import Vlm
from edgevlm.models.weights import Source, empty_model, load_weights, read
from edgevlm.shapes.config import VlmConfig


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors by name; None removes one."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def edit_decoder(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["decoder"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, place: Callable[[str, VlmConfig], Placements | None]) -> Vlm:
    """The model in ``folder`` as a family that places tensors with ``place``."""
    family: Family = replace(FAMILY, place=place)
    config = native_config(ModelFolder(folder))
    return load_weights(config, read_headers(folder), family, torch.float32, where=str(folder))


def test_shards_load_as_one_file_does(folder: Path) -> None:
    whole = load_model(folder).model.state_dict()
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    loaded = load_model(folder)
    assert [file.name for file in loaded.files] == ["model-0.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert all(torch.equal(whole[name], tensor) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "given"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("keep", torch.float16)]
)
def test_weights_are_cast_and_counts_are_not(folder: Path, asked: str, given: torch.dtype) -> None:
    save_native(load_model(folder).model, folder, dtype=torch.float16)
    state, stored = load_model(folder, dtype=asked).model.state_dict(), load_file(folder / WEIGHTS)
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    assert counts
    assert {state[name].dtype for name in counts} == {torch.int64}
    assert {tensor.dtype for name, tensor in state.items() if name not in counts} == {given}
    assert all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in state.items())


def test_an_unknown_type_and_a_session_in_half_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="dtype must be one of float32, float16, bfloat16, keep"):
        load_model(tiny_checkpoint, dtype="fp4")
    with pytest.raises(UsageError, match="load it in float32"):
        load_model(tiny_checkpoint, dtype="float16").open()


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("head", "tied"),
    [
        (lambda embedding: None, True),
        (lambda embedding: embedding.clone(), True),
        (lambda embedding: embedding.double(), True),
        (lambda embedding: embedding + torch.eye(*embedding.shape) * 1e-3, False),
    ],
    ids=["absent", "equal", "equal in another type", "different"],
)
def test_the_tensors_decide_whether_the_head_is_tied(
    folder: Path, head: Callable[[Tensor], Tensor | None], tied: bool, stated: bool
) -> None:
    edit_decoder(folder, tie_word_embeddings=stated)
    rewrite(folder, {"lm_head.weight": head(load_file(folder / WEIGHTS)["embed_tokens.weight"])})
    net = load_model(folder).model
    assert (net.lm_head is None) is tied
    assert net.config.decoder.tie_word_embeddings is tied
    stored = load_file(folder / WEIGHTS)
    assert torch.equal(net.head_weight, stored.get("lm_head.weight", stored["embed_tokens.weight"]).float())


def test_a_tied_pair_may_be_stored_as_its_head(folder: Path) -> None:
    embedding = load_file(folder / WEIGHTS)["embed_tokens.weight"]
    rewrite(folder, {"embed_tokens.weight": None, "lm_head.weight": embedding})
    net = load_model(folder).model
    assert net.lm_head is None
    assert torch.equal(net.embed_tokens.weight, embedding)


def test_a_head_does_not_stand_in_for_an_embedding_of_its_own(folder: Path) -> None:
    edit_decoder(folder, tie_word_embeddings=False)
    rewrite(folder, {"embed_tokens.weight": None, "lm_head.weight": torch.zeros(512, 64)})
    with pytest.raises(IntegrityError, match=r"\(1 missing\): missing embed_tokens\.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    ("stated", "head", "warns"),
    [(False, None, True), (False, lambda embedding: embedding.clone(), False), (True, None, False)],
    ids=["lost", "equal", "tied"],
)
def test_a_head_that_is_promised_and_not_there_is_a_warning(
    folder: Path,
    stated: bool,
    head: Callable[[Tensor], Tensor] | None,
    warns: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit_decoder(folder, tie_word_embeddings=stated)
    rewrite(folder, {"lm_head.weight": head(load_file(folder / WEIGHTS)["embed_tokens.weight"]) if head else None})
    with caplog.at_level(logging.INFO, "edgevlm"):
        load_model(folder)
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("the weights hold no head: taking the embedding" in message for message in found) is warns


def test_heads_that_differ_in_the_last_number_alone_are_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.models.weights.CHUNK_ELEMENTS", 100)
    head = load_file(folder / WEIGHTS)["embed_tokens.weight"].clone()
    head[-1, -1] += 1
    rewrite(folder, {"lm_head.weight": head})
    assert load_model(folder).model.lm_head is not None


@pytest.mark.parametrize("rows", [520, 600])
@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_decide_how_many_rows_there_are(
    folder: Path, rows: int, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    head = None if tied else torch.randn(rows, 64)
    rewrite(folder, {"embed_tokens.weight": torch.randn(rows, 64), "lm_head.weight": head})
    with caplog.at_level(logging.INFO, "edgevlm"):
        assert load_model(folder).model.config.decoder.vocab_size == rows
    assert f"the embedding has {rows} rows, config.json says 512" in caplog.text


def test_fewer_rows_than_tokens_and_heads_of_another_size_are_refused(folder: Path) -> None:
    rewrite(folder, {"embed_tokens.weight": torch.randn(100, 64)})
    with pytest.raises(ConfigError, match=r"the tokenizer has .* the decoder only 100"):
        load_model(folder)
    rewrite(folder, {"lm_head.weight": torch.randn(512, 64)})
    with pytest.raises(IntegrityError, match=r"embed_tokens\.weight is \(100, 64\), expected \(512, 64\)"):
        load_model(folder)


def test_what_does_not_fit_is_told_in_the_names_of_the_file(folder: Path) -> None:
    def in_file(name: str) -> str:
        return name.replace("decoder.", "language_model.model.")

    def place(name: str, config: VlmConfig) -> Placements | None:
        return None if "up_project" in name else (Placement(name=name.replace("language_model.model.", "decoder.")),)

    tensors = {in_file(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    layer = "language_model.model.layers.1.mlp"
    tensors[f"{layer}.up_project.weight"] = tensors.pop(f"{layer}.up_proj.weight")
    tensors["language_model.model.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(IntegrityError) as raised:
        load(folder, place)
    assert str(raised.value) == (
        f"{folder} does not fit its config.json (1 missing, 1 unexpected, 1 misshapen): "
        f"missing decoder.layers.1.mlp.up_proj.weight (from {layer}.up_proj.weight), "
        f"nearest in the file: {layer}.up_project.weight; unexpected {layer}.up_project.weight; "
        "language_model.model.norm.weight is (3,), expected (64,)"
    )


def test_a_name_is_only_guessed_where_both_call_the_rest_the_same() -> None:
    named = {"decoder.layers.0.norm.weight": "model.layers.0.norm.weight", "vision_encoder.a.weight": "tower.b.weight"}
    assert name_in_file("decoder.layers.1.mlp.bias", named) == "model.layers.1.mlp.bias"
    assert name_in_file("vision_encoder.c.weight", named) == ""


def test_many_misfits_are_counted_and_some_are_named(folder: Path) -> None:
    edit_decoder(folder, num_hidden_layers=9)
    with pytest.raises(IntegrityError, match=r"\(63 missing\): missing decoder\.layers\.2\..*; and 60 more$"):
        load_model(folder)


def test_two_tensors_for_one_place_are_refused(folder: Path) -> None:
    rewrite(folder, {"twice.decoder.norm.weight": torch.ones(64)})
    with pytest.raises(IntegrityError, match=r"twice\.decoder\.norm\.weight.* which are the same tensor"):
        load(folder, lambda name, config: (Placement(name=name.removeprefix("twice.")),))


def test_an_integer_where_numbers_belong_is_refused(folder: Path) -> None:
    rewrite(folder, {"decoder.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(IntegrityError, match=r"decoder\.norm\.weight is \(64,\) I8, expected \(64,\) float32"):
        load_model(folder)


def test_counts_may_be_left_out_and_what_is_not_needed_is_passed_over(folder: Path) -> None:
    counts = {name: None for name in load_file(folder / WEIGHTS) if name.endswith("num_batches_tracked")}
    assert counts
    rewrite(folder, {**counts, "rotary.inv_freq": torch.ones(3)})
    net = load(folder, lambda name, config: NOT_NEEDED if "inv_freq" in name else (Placement(name=name),))
    assert {int(net.state_dict()[name]) for name in counts} == {0}


STORED = torch.arange(24.0).reshape(1, 1, 6, 4)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Placement(name="x"), STORED),
        (Placement(name="x", squeeze=True), STORED[0, 0]),
        (Placement(name="x", squeeze=True, transpose=True), STORED[0, 0].T),
        (Placement(name="x", squeeze=True, part=(1, 3)), STORED[0, 0, 2:4]),
        (Placement(name="x", squeeze=True, part=(2, 3), transpose=True), STORED[0, 0, 4:].T),
    ],
    ids=["as it is", "squeezed", "transposed", "a part", "a part transposed"],
)
def test_a_tensor_is_changed_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Placement, expected: Tensor, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr("edgevlm.models.weights.CHUNK_ELEMENTS", chunk)
    save_file({"before": torch.ones(3), "x": STORED.to(dtype)}, tmp_path / WEIGHTS)
    found = read(Source(read_headers(tmp_path)["x"], where), torch.float32)
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_a_file_that_ends_meanwhile_is_told(tmp_path: Path) -> None:
    save_file({"x": STORED}, tmp_path / WEIGHTS)
    (stored,) = read_header(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(IntegrityError, match="ends within x"):
        read(Source(stored, Placement(name="x")), torch.float32)


def test_what_a_module_derives_is_there_after_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Vlm.__init__

    def with_table(self: Vlm, config: VlmConfig) -> None:
        build(self, config)
        self.decoder.register_buffer("table", torch.arange(5) * 2, persistent=False)

    monkeypatch.setattr(Vlm, "__init__", with_table)
    net = load_model(folder).model
    assert net.decoder.get_buffer("table").tolist() == [0, 2, 4, 6, 8]
    assert not any(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))


def test_an_empty_model_takes_no_memory_and_later_ones_do(tiny_checkpoint: Path) -> None:
    config = native_config(ModelFolder(tiny_checkpoint))
    assert all(tensor.is_meta for tensor in empty_model(config).state_dict().values())
    assert not any(tensor.is_meta for tensor in Vlm(config).state_dict().values())


# About 100 M parameters, half of them in the embedding, in a file of zeros that takes no room on the disk.
MEASURE_LOADING = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from edgevlm.families.folder import ModelFolder
from edgevlm.families.native import FAMILY, native_config
from edgevlm.families.tensors import WEIGHTS, read_headers
from edgevlm.models.weights import empty_model, load_weights

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

folder, kind, size, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
config = native_config(ModelFolder(folder))
load_weights(config, read_headers(folder), FAMILY, torch.float32, where="here")  # what code takes is there already
wide = replace(config.decoder, vocab_size=50_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
config = replace(config, decoder=wide)
header, end = {}, 0
for name, tensor in empty_model(config).state_dict().items():
    dtype, item = (kind, size) if tensor.is_floating_point() else ("I64", 8)
    header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.numel() * item]}
    end += tensor.numel() * item
text = json.dumps(header).encode()
with (out / WEIGHTS).open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
net = load_weights(config, read_headers(out), FAMILY, torch.float32, where="here")
print(sum(tensor.nbytes for tensor in net.state_dict().values()), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
@pytest.mark.parametrize(("kind", "size"), [("F32", 4), ("BF16", 2)])
def test_loading_takes_little_more_memory_than_the_model(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, size: int
) -> None:
    command = [sys.executable, "-c", MEASURE_LOADING, str(tiny_checkpoint), kind, str(size), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    num_bytes, peak_bytes = map(int, ran.stdout.split())
    assert num_bytes > 400e6
    assert 0.95 * num_bytes < peak_bytes < 1.3 * num_bytes
