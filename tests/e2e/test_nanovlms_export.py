"""The NanoVLMs paper's mini model from weights to a bundle that answers: 5.3 million parameters, random ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app
from edgevlm.distill.vocabulary import save_tokenizer, texts_of, train_tokenizer
from edgevlm.evaluation.scenes import make_scene, render
from edgevlm.families.nanovlms import nanovlms, write_processor
from edgevlm.models.checkpoint import load_model, save_native
from edgevlm.models.vlm import Vlm
from edgevlm.processing.chat import user_message
from edgevlm.runtimes.open import open_bundle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights spread enough for every part to count; they are kept in full."""
    folder = tmp_path_factory.mktemp("mini")
    tokenizer = train_tokenizer((t for i in range(50) for t in texts_of(make_scene(1, i))), 2048)
    save_tokenizer(tokenizer, folder)
    write_processor(folder, nanovlms("mini"))
    model = Vlm(nanovlms("mini"))
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_native(model, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, exported by command; the gate has compared every stage."""
    out = tmp_path_factory.mktemp("bundles") / "mini.bundle"
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), "-q"])
    assert result.exit_code == 0, result.stderr
    return out


def test_a_checkpoint_survives_saving_and_loading(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_model(checkpoint)
    assert loaded.model.config == nanovlms("mini")
    save_native(loaded.model, tmp_path, dtype=torch.float32)
    assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_every_stage_of_the_gate_passes(bundle: Path) -> None:
    stages = {stage["stage"]: stage for stage in json.loads((bundle / "verify.json").read_text())["stages"]}
    assert {"image_features", "prefill_logits", "decode_logits", "greedy_ids"} <= stages.keys()
    assert all(stage["passed"] for stage in stages.values())
    assert stages["greedy_ids"]["max_abs"] == 0


def test_the_cache_has_heads_of_sixteen_for_heads_of_twelve(bundle: Path) -> None:
    decoder = read_bundle(bundle).manifest.decoder
    assert (decoder.num_key_value_heads, decoder.head_size) == (8, 16)


def test_a_prompt_is_the_picture_and_the_text_to_continue(checkpoint: Path) -> None:
    processor = load_model(checkpoint).processor
    ids = processor.input_ids([user_message("There is a red", num_images=1)])
    assert ids[0] == processor.image_token_id
    assert processor.tokenizer.decode(ids[1:].tolist()) == "There is a red"


def test_the_bundle_continues_as_pytorch_does_and_sees_the_picture(bundle: Path, checkpoint: Path) -> None:
    pictures = [render(make_scene(7, index), 160) for index in (0, 1)]
    reference = load_model(checkpoint).open()
    answers = []
    with open_bundle(bundle) as vlm:
        for picture in pictures:
            found = vlm.ask(picture, "There is a red", max_tokens=48)
            assert found.token_ids == reference.ask(picture, "There is a red", max_tokens=48).token_ids
            answers.append(found.token_ids)
    assert answers[0] != answers[1]
