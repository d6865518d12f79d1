"""How codes are packed and how graphs lie on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgevlm.bundle.manifest import PartFile, RowTable
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.graph_writer import GraphWriter, is_half
from edgevlm.export.matmuls import Codes
from edgevlm.export.parts import split
from edgevlm.export.storage import PAGE_BYTES, save_graph
from edgevlm.export.target import Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.vlm import Vlm
from edgevlm.quant.rounding import QuantizedWeight
from edgevlm.shapes.config import DecoderConfig, HybridConfig, MlpConfig, VlmConfig

MIB = 1 << 20


def weight(codes: list[list[int]], bits: int, points: list[list[int]] | None = None) -> QuantizedWeight:
    return QuantizedWeight(
        codes=torch.tensor(codes, dtype=torch.uint8),
        scales=torch.ones(len(codes), 1 if points is None else len(points[0])),
        zero_points=None if points is None else torch.tensor(points, dtype=torch.uint8),
        bits=bits,
        group_size=32,
    )


def test_blocks_hold_two_codes_to_the_byte_the_first_one_lower() -> None:
    """A block of 32 codes takes 16 bytes; of what is missing every code is 8, which stands for zero."""
    blocks = Codes([weight([[1, 2, 15]], 4), weight([[0, 7, 8]], 4)]).blocks()
    assert blocks.shape == (2, 16)
    assert blocks[:, :3].tolist() == [[0x21, 0x8F, 0x88], [0x70, 0x88, 0x88]]


def test_blocks_of_eight_bits_are_the_codes() -> None:
    blocks = Codes([weight([[1, 2, 255]], 8)]).blocks()
    assert blocks.shape == (1, 32)
    assert blocks[0, :5].tolist() == [1, 2, 255, 128, 128]


def test_an_odd_number_of_zero_points_ends_in_half_a_byte() -> None:
    assert Codes([weight([[0] * 3], 4, [[3]])]).packed_points().tolist() == [[3]]
    assert Codes([weight([[0] * 3], 4, [[3, 4]])]).packed_points().tolist() == [[0x43]]


def test_transposed_codes_lie_output_by_output_and_are_signed() -> None:
    """Rows (1, 2) and (8, 15) become columns; 8 stands for zero and becomes 0, 1 becomes -7, which is 9."""
    packed = Codes([weight([[1, 2]], 4), weight([[8, 15]], 4)]).transposed()
    assert packed.shape == (32,)
    assert packed[:3].tolist() == [0x09, 0x7A, 0x88]


def test_transposed_codes_beside_zero_points_stay_unsigned() -> None:
    assert Codes([weight([[1, 2]], 4, [[5]])]).transposed()[:2].tolist() == [0x21, 0]


def model_of(width: int, vocabulary: int) -> Vlm:
    decoder = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=32,
    )
    vision = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=decoder))
    model.initialize(0)
    return model.eval()


def lower(model: Vlm, name: str, folder: Path, precision: str = "fp32", **options: bool) -> PartFile:
    part = next(part for part in split(model) if part.name == name)
    return OnnxTarget(Lowering(**options)).lower(part, folder, precision)


def test_a_small_decoder_is_one_file(tmp_path: Path) -> None:
    file = lower(model_of(64, 300), "decoder_model_merged", tmp_path)
    assert file.files == ("onnx/decoder_model_merged.onnx",)
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["decoder_model_merged.onnx"]


def test_large_weights_lie_beside_the_graph_and_begin_at_pages(tmp_path: Path) -> None:
    file = lower(model_of(512, 6000), "decoder_model_merged", tmp_path)
    assert file.extra_files == ("onnx/decoder_model_merged.onnx_data",)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == [Path(name).name for name in file.files]
    assert (tmp_path / file.file).stat().st_size < 0.1 * MIB
    tensors = [value.const_value for value in ir.load(tmp_path / file.file).graph.initializers.values()]
    large = [tensor for tensor in tensors if tensor is not None and tensor.nbytes >= 1024]
    assert len(large) == 10  # qkv, o, gate and up, down, head, three norms, cosine, sine: the last two once
    for tensor in large:
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.nbytes < PAGE_BYTES or (tensor.offset or 0) % PAGE_BYTES == 0


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, files = model_of(512, 6000), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(lower(model, "decoder_model_merged", tmp_path / name))
    assert files[0] == files[1]
    for name in files[0].files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def mapped(root: Path, table: RowTable) -> np.ndarray:
    shape = (table.num_rows, table.num_columns)
    return np.memmap(root / table.file, table.dtype, "r", table.offset, shape)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_rows_of_the_embedding_can_be_read_from_the_file(precision: str, dtype: str, tmp_path: Path) -> None:
    model = model_of(64, 300)
    table = lower(model, "embed_tokens", tmp_path, precision).table
    assert table is not None
    assert (table.dtype, table.num_rows, table.num_columns) == (dtype, 300, 64)
    expected = model.embed_tokens.weight.detach().numpy().astype(dtype)
    assert np.array_equal(mapped(tmp_path, table), expected)


def test_an_embedding_that_float16_holds_is_stored_so_and_stays_exact(tmp_path: Path) -> None:
    model = model_of(64, 300)
    model.embed_tokens.weight.data = model.embed_tokens.weight.data.half().float()
    file = lower(model, "embed_tokens", tmp_path, half_storage=True)
    assert file.precision == "fp32"
    assert file.table is not None
    assert file.table.dtype == "float16"
    assert np.array_equal(mapped(tmp_path, file.table), model.embed_tokens.weight.detach().numpy())


def test_an_embedding_that_float16_would_round_stays_whole(tmp_path: Path) -> None:
    table = lower(model_of(64, 300), "embed_tokens", tmp_path, half_storage=True).table
    assert table is not None
    assert table.dtype == "float32"


def test_an_embedding_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = model_of(64, 300)
    model.embed_tokens.weight.data[7, 7] = -70000.0
    with pytest.raises(UnsupportedError, match=r"embed_tokens.weight holds 7e\+04, float16 ends at 65504"):
        lower(model, "embed_tokens", tmp_path, "fp16")


def test_a_matrix_is_looked_at_piece_by_piece() -> None:
    """One number among five million decides."""
    matrix = torch.ones(5000, 1000)
    assert is_half(matrix)
    matrix[4999, 999] = 1 + 2**-12
    assert not is_half(matrix)


def test_columns_stand_beside_each_other(tmp_path: Path) -> None:
    writer = GraphWriter()
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    value = writer.columns(lambda: [first, second], (2, 3), "both")
    assert value.const_value is not None
    assert value.const_value.numpy().tolist() == [[1, 3, 5], [2, 4, 6]]


def test_a_file_beside_the_graph_can_be_asked_for(tmp_path: Path) -> None:
    writer = GraphWriter()
    value = writer.weight(torch.ones(256), "ones")
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
    assert save_graph(ir.Model(graph, ir_version=10), tmp_path / "a.onnx", external=True) == ("a.onnx_data",)
    assert (tmp_path / "a.onnx_data").stat().st_size == 1024


MEASURE_WRITING = """
import ctypes
import sys
from pathlib import Path

import torch

from edgevlm.export.parts import split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.shapes.config import DecoderConfig, HybridConfig, MlpConfig, VlmConfig

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def lower(width, out):
    decoder = DecoderConfig(
        vocab_size=8000, hidden_size=width, intermediate_size=8 * width, num_hidden_layers=4,
        num_attention_heads=width // 64, num_key_value_heads=1, head_dim=64, max_position_embeddings=64,
    )
    vision = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=decoder)).requires_grad_(False)
    part = next(part for part in split(model) if part.name == "decoder_model_merged")
    codes = None if precision.startswith("fp") else quantize_decoder(model, precision)
    del model
    ctypes.CDLL(None).malloc_trim(0)  # what rounding left free should not serve again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    file = OnnxTarget(Lowering(plain=plain)).lower(part, out, precision, Extras(quantized=codes))
    return status("VmHWM") - before, (out / file.extra_files[0]).stat().st_size if file.extra_files else 0

precision, plain, folder = sys.argv[1], sys.argv[2] == "plain", Path(sys.argv[3])
torch.set_num_threads(1)
lower(128, folder)  # what is imported and cached once
print(*lower(768, folder))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
@pytest.mark.parametrize(
    ("precision", "dialect", "largest"),
    [  # of the file's tensors: gate and up of a layer, 9.4 M numbers
        ("fp32", "contrib", 36 * MIB),
        ("fp32", "plain", 36 * MIB),
        ("int8-dynamic", "contrib", 9 * MIB),
        ("int4-b128-rtn", "contrib", 4.5 * MIB),
        ("fp16", "contrib", 36 * MIB),  # the wide one, of which the narrow one is made: together 54 MiB
    ],
)
def test_writing_takes_little_more_memory_than_the_largest_weight(
    precision: str, dialect: str, largest: float, tmp_path: Path
) -> None:
    """Weights are made one after the other as they are written: 4 layers and a head never lie in memory twice."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}  # else glibc keeps up to 32 MiB that were freed
    command = [sys.executable, "-c", MEASURE_WRITING, precision, dialect, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    peak_bytes, file_bytes = map(int, ran.stdout.split())
    assert file_bytes > 2 * largest
    assert peak_bytes > 0.9 * largest
    assert peak_bytes < 1.3 * largest + 16 * MIB  # what heaps and libraries take anew
