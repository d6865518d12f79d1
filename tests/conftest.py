"""What every test shares: no downloads, a cache of its own, and public data sets where a machine has them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download something fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and our subprocesses do not mix


def _lacks_operators(package: str) -> bool:
    """Whether ``package`` is installed, but was compiled for another PyTorch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        return True
    return not hasattr(getattr(torch.ops, package), "nms")


# A torchvision built for CUDA beside a CPU PyTorch does not import, and then neither do timm and transformers'
# models: its two compiled operators are missing.  Nothing here calls them, so their signatures are enough.
if _lacks_operators("torchvision"):
    TORCHVISION_OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        TORCHVISION_OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

ROOT = Path(__file__).resolve().parent.parent
DATA_VARIABLE = "EDGEVLM_TEST_DATA"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered between runs stays out of the user's own cache."""
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def product_files() -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing tells product files from build outputs")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of public data sets that ``EDGEVLM_TEST_DATA`` names."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set: it names a folder with public data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Path]:
    """Write a tokenizer of single bytes (ids 0 to 255) and special tokens at given ids (256 and above) into a folder.

    ``tiny_tokenizer(folder, {"<image>": 256, "</s>": 257}, eos_token="</s>", chat_template="...")``: what is named
    goes into tokenizer_config.json.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def write(folder: Path, extra_tokens: Mapping[str, int], **settings: object) -> Path:
        letters = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE({**letters, **extra_tokens}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra_tokens])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of random weights, 0.2 M parameters, in train form: the smallest model with every part."""
    import torch

    from edgevlm.core.config import to_json
    from edgevlm.distill.publish import processor_file
    from edgevlm.distill.recipe import Optimization, SceneData, TrainRecipe
    from edgevlm.distill.vocabulary import save_tokenizer, texts_of, train_tokenizer
    from edgevlm.evaluation.scenes import make_scene
    from edgevlm.models.checkpoint import save_native
    from edgevlm.models.vlm import Vlm
    from edgevlm.shapes.config import DecoderConfig, HybridConfig, UnshuffleConfig, VlmConfig

    folder = tmp_path_factory.mktemp("tiny")
    config = VlmConfig(
        vision=HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1)),
        projector=UnshuffleConfig(factor=2),
        decoder=DecoderConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
        ),
    )
    model = Vlm(config)
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_tokenizer(train_tokenizer((t for i in range(50) for t in texts_of(make_scene(1, i))), 512), folder)
    recipe = TrainRecipe(
        name="tiny",
        model=config,
        data=SceneData(num_scenes=64),
        optimization=Optimization(steps=1, warmup_steps=0, decay_steps=0),
    )
    (folder / "processor.json").write_text(to_json(processor_file(recipe, folder)))
    save_native(model, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported.  Copy it before you damage it."""
    from edgevlm.export.pipeline import export_bundle

    return export_bundle(tiny_checkpoint, out=tmp_path_factory.mktemp("bundles") / "tiny.bundle")
