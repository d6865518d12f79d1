"""Commands that must fail well: how they are run, and what they are run on."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgevlm.bundle.write import write_sums
from edgevlm.cli import console
from edgevlm.cli.app import app

Refused = Callable[..., str]
Reseal = Callable[..., None]


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """The command line takes over the package's log; afterwards it is as before."""
    logger = logging.getLogger("edgevlm")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    console.settings.quiet = console.settings.verbose = False


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below ``folder``: the bytes of files, the goal of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = kind
    return found


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Run a command line that must fail with ``code`` and one line that holds ``words``.

    Nothing may come out on stdout, and everything below ``tmp_path`` must be as it was before.
    """

    def run(code: int, words: str | tuple[str, ...], *arguments: object, stdin: str | None = None) -> str:
        before = contents(tmp_path)
        result = CliRunner().invoke(app, [*map(str, arguments), "-q"], input=stdin)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
        assert "unexpected" not in result.stderr
        for word in (words,) if isinstance(words, str) else words:
            assert word in result.stderr
        assert contents(tmp_path) == before
        return result.stderr

    return run


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def reseal() -> Reseal:
    """Change a bundle's manifest with ``change``, and make lengths and hashes fit again."""

    def run(bundle: Path, change: Callable[[dict[str, object]], object] = lambda manifest: None) -> None:
        manifest = json.loads((bundle / "edgevlm.json").read_text())
        change(manifest)
        present = [name for name in manifest["file_bytes"] if (bundle / name).exists()]
        manifest["file_bytes"] = {name: (bundle / name).stat().st_size for name in present}
        (bundle / "edgevlm.json").write_text(json.dumps(manifest))
        write_sums(bundle)

    return run


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage; without a task suite, which would be most of an export's time."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    processor = json.loads((copy / "processor.json").read_text())
    (copy / "processor.json").write_text(json.dumps({**processor, "suite": ""}))
    return copy


@pytest.fixture(scope="session")
def run_file(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement on disk."""
    file = tmp_path_factory.mktemp("runs") / "run.jsonl"
    options = ["-r", "2", "-n", "2", "--threads", "1", "-q"]
    result = CliRunner().invoke(app, ["bench", str(tiny_bundle), "--save", str(file), *options])
    assert result.exit_code == 0, result.output
    return file


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., None]:
    """Write ``model.safetensors`` of a real model's size: random values, one tensor in memory at a time.

    ``random_weights(folder, {"name": shape}, "BF16")``.  Norms are near 1, and matrices keep the size of what they
    multiply, so that every tensor counts in the result.  ``change(name, values)`` may make others of them.
    """
    import torch

    types = {"BF16": torch.bfloat16, "F16": torch.float16}

    def write(
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, values: values,
    ) -> None:
        header, end, generator = {}, 0, torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                noise = torch.randn(shape, generator=generator)
                if len(shape) > 1:
                    values = noise * math.prod(shape[1:]) ** -0.5
                else:
                    values = noise * 0.1 + float(name.endswith("weight"))
                file.write(change(name, values).to(types[dtype]).view(torch.uint8).numpy().tobytes())

    return write


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., None]:
    """Write a tokenizer that spells text in single bytes, and has a word of its own for every other id.

    ``word_tokenizer(folder, 49_280, {"<image>": 49_190})``: the size of the vocabulary, and special tokens in it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def write(folder: Path, size: int, special: Mapping[str, int]) -> None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = {id: token for token, id in special.items()}
        words = [*letters, *(f"w{id}" for id in range(len(letters), size))]
        tokenizer = Tokenizer(models.BPE({names.get(id, word): id for id, word in enumerate(words)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")

    return write
