from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import write_trt_bundle

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.pack import pack, unpack
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.bundle.recipe import PartRecipe, Profile, Recipe, read_recipe, write_recipe
from edgevlm.bundle.write import write_sums
from edgevlm.core.errors import DeviceError, IntegrityError, UnsupportedError
from edgevlm.runtimes.trt import store
from edgevlm.runtimes.trt.api import Api, api_of
from edgevlm.runtimes.trt.store import EngineKey, find_engine, graph_of, keep_engine, kept_engine, locked, make_key

ORIN, ADA, TURING = (8, 7), (8, 9), (7, 5)
ENGINE = b"an engine of no vendor"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_trt_bundle(tmp_path / "tiny.bundle"))


def fake_api(version: str = "10.3.0", flavour: str = "tensorrt") -> Api:
    return api_of(fake_tensorrt(version, flavour))


def part_of(bundle: Bundle, name: str = "vision_encoder") -> PartFile:
    return bundle.manifest.part(name, target="tensorrt")


def put(bundle: Bundle, part: PartFile, api: Api, capability: str = "8.7", **options: Any) -> Path:
    """Keep an engine of ``part`` for that device, and return its file."""
    graph = graph_of(part, api)[0]
    recipe = read_recipe(bundle)
    profiles = recipe.of(part.part, in_place=graph == part.in_place).profiles[:1]
    settings: dict[str, Any] = {"flavour": api.flavour, "version": api.version_text, **options}
    key = make_key(
        bundle, part, graph, profiles, max_context=recipe.max_context, compute_capability=capability, **settings
    )
    folder = bundle.root / key.folder
    folder.mkdir(parents=True, exist_ok=True)
    keep_engine(folder, store.stem_of(graph), ENGINE, key, [profiles[0].name], 64)
    return folder / f"{store.stem_of(graph)}.engine"


def test_an_engine_is_found_by_device_and_version(bundle: Bundle) -> None:
    part, api = part_of(bundle), fake_api()
    path = put(bundle, part, api)
    assert path.parent.name == "sm_87-tensorrt10.3.0"
    found = find_engine(bundle, part, api, ORIN)
    assert (found.path, found.graph, found.entry.profiles) == (path, part.file, ("batch-1",))
    with found.buffer() as view:
        assert bytes(view) == ENGINE


def test_without_an_engine_the_command_that_builds_it_is_told(bundle: Bundle) -> None:
    with pytest.raises(
        UnsupportedError, match=r"has no engine for sm_87 with TensorRT 10\.3\.0.*edgevlm build .*first"
    ):
        find_engine(bundle, part_of(bundle), fake_api(), ORIN)


def test_an_engine_for_another_place_says_which_and_where_we_are(bundle: Bundle) -> None:
    part = part_of(bundle)
    put(bundle, part, fake_api())
    words = r"built for sm_87 with TensorRT 10\.3\.0 on .*, here is sm_89 with TensorRT 10\.13\.2 on .*edgevlm build"
    with pytest.raises(UnsupportedError, match=words):
        find_engine(bundle, part, fake_api("10.13.2"), ADA)


@pytest.mark.parametrize(
    ("built", "options", "here", "capability", "runs"),
    [
        (("10.3.0", "tensorrt"), {}, ("10.3.0", "tensorrt"), ORIN, True),
        (("10.3.0", "tensorrt"), {}, ("10.3.1", "tensorrt"), ORIN, False),
        (("10.3.0", "tensorrt"), {"version_compatible": True}, ("10.13.2", "tensorrt"), ORIN, True),
        (("10.3.0", "tensorrt"), {"version_compatible": True}, ("11.4.0", "tensorrt"), ORIN, True),
        (("10.13.2", "tensorrt"), {"version_compatible": True}, ("10.3.0", "tensorrt"), ORIN, False),
        (("11.4.0", "tensorrt"), {"version_compatible": True}, ("12.0.0", "tensorrt"), ORIN, False),
        (("10.3.0", "tensorrt"), {"version_compatible": True}, ("10.3.0", "tensorrt"), ADA, False),
        (("10.3.0", "tensorrt"), {"hardware_compatible": True}, ("10.3.0", "tensorrt"), ADA, True),
        (("10.3.0", "tensorrt"), {"hardware_compatible": True}, ("10.3.0", "tensorrt"), TURING, False),
        (("10.3.0", "tensorrt"), {"hardware_compatible": True}, ("10.13.2", "tensorrt"), ORIN, False),
        (("1.7.1", "rtx"), {}, ("1.7.1", "rtx"), ORIN, True),
        (("1.7.1", "rtx"), {}, ("1.6.0", "rtx"), ORIN, False),
        (("1.7.1", "rtx"), {}, ("10.3.0", "tensorrt"), ORIN, False),
    ],
)
def test_where_an_engine_runs(
    built: tuple[str, str],
    options: dict[str, bool],
    here: tuple[str, str],
    capability: tuple[int, int],
    runs: bool,
) -> None:
    version, flavour = built
    key = EngineKey(
        compute_capability="8.7",
        flavour=flavour,
        version=version,
        system=store.this_system(),
        sources={},
        recipe="",
        **options,  # type: ignore[arg-type]
    )
    assert store.runs_here(key, fake_api(*here), capability) is runs
    assert not store.runs_here(replace(key, system="plan9-vax"), fake_api(*here), capability)


def test_a_graph_that_changed_needs_its_engine_again(bundle: Bundle) -> None:
    part, api = part_of(bundle), fake_api()
    put(bundle, part, api)
    with (bundle.root / part.file).open("ab") as stream:
        stream.write(b"\x00")
    write_sums(bundle.root)
    with pytest.raises(IntegrityError, match=r"built from other files than tensorrt/vision_encoder_fp16.onnx is now"):
        find_engine(bundle, part, api, ORIN)


@pytest.mark.parametrize("change", ["max_context", "shapes", "name"])
def test_a_recipe_that_changed_needs_its_engines_again(bundle: Bundle, change: str) -> None:
    part, api = part_of(bundle), fake_api()
    put(bundle, part, api)
    recipe = read_recipe(bundle)
    first, *others = recipe.parts["vision_encoder"].profiles
    changed = {
        "max_context": replace(recipe, max_context=32),
        "shapes": with_encoder(recipe, replace(first, shapes={"pixel_values": ((1, 3, 4, 4),) * 3}), *others),
        "name": with_encoder(recipe, replace(first, name="one"), *others),
    }
    write_recipe(bundle.root, changed[change])
    words = (
        r"vision_encoder_fp16\.engine was built for other sizes than tensorrt/build\.json has now: run `edgevlm build"
    )
    with pytest.raises(IntegrityError, match=words):
        find_engine(bundle, part, api, ORIN)


def with_encoder(recipe: Recipe, *profiles: Profile) -> Recipe:
    return replace(recipe, parts={**recipe.parts, "vision_encoder": PartRecipe(profiles=profiles)})


@pytest.mark.parametrize("damage", ["index", "cut", "stale"])
def test_a_folder_that_is_damaged_does_not_block_a_good_engine(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    part, api = part_of(bundle), fake_api("10.13.2")
    bad = put(bundle, part, api)
    good = put(bundle, part, fake_api(), version_compatible=True)
    if damage == "index":
        (bad.parent / "engine.json").write_text("{")
    elif damage == "cut":
        bad.write_bytes(b"")
    else:
        write_index(bad, sources={})
    assert find_engine(bundle, part, api, ORIN).path == good
    assert "passed over" in caplog.text
    good.unlink()
    with pytest.raises(IntegrityError, match="edgevlm build"):
        find_engine(bundle, part, api, ORIN)


def write_index(engine: Path, **changes: Any) -> None:
    """Let the list of engines say something else about the key of ``engine``."""
    file = engine.parent / "engine.json"
    index = json.loads(file.read_text())
    index["engines"][engine.stem]["key"].update(changes)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("content", [b"", ENGINE[:-1], b"X" + ENGINE[1:]])
def test_a_damaged_engine_is_not_opened(bundle: Bundle, content: bytes) -> None:
    part, api = part_of(bundle), fake_api()
    put(bundle, part, api).write_bytes(content)
    with (
        pytest.raises(IntegrityError, match=r"changed or damaged .*edgevlm build"),
        find_engine(bundle, part, api, ORIN).buffer(),
    ):
        pass


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"engines": {"a": 1}}'])
def test_a_damaged_list_of_engines_says_how_to_mend_it(bundle: Bundle, text: str) -> None:
    part, api = part_of(bundle), fake_api()
    path = put(bundle, part, api)
    (path.parent / "engine.json").write_text(text)
    with pytest.raises(IntegrityError, match="edgevlm build --overwrite"):
        find_engine(bundle, part, api, ORIN)
    put(bundle, part, api)
    assert find_engine(bundle, part, api, ORIN).path == path


def test_the_graph_in_place_goes_before_rows(bundle: Bundle) -> None:
    part, new, old = part_of(bundle, "decoder_model_merged"), fake_api("11.4.0"), fake_api("10.13.2")
    assert graph_of(part, new) == (part.in_place, True)
    assert graph_of(part, old) == graph_of(part, None) == (part.file, False)
    rows, in_place = put(bundle, part, old), put(bundle, part, new)
    assert (rows.stem, in_place.stem) == ("decoder_model_merged_fp16", "decoder_model_merged_fp16_in_place")
    found = find_engine(bundle, part, new, ORIN)
    assert (found.path, found.in_place) == (in_place, True)
    assert store.source_files(part, part.in_place) == (part.in_place, "tensorrt/decoder_model_merged_fp16.onnx_data")


def test_an_engine_that_is_built_again_is_never_listed_with_the_old_hash(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, api = part_of(bundle), fake_api()
    folder = put(bundle, part, api).parent

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "sha256", full)
    key = store.read_index(folder).engines["vision_encoder_fp16"].key
    with pytest.raises(Exception, match="no space left"):
        keep_engine(folder, "vision_encoder_fp16", b"a new one", key, [], 64)
    assert json.loads((folder / "engine.json").read_text())["engines"] == {}
    assert not list(folder.glob(".*"))


def test_only_a_whole_engine_with_the_same_key_is_kept(bundle: Bundle) -> None:
    part, api = part_of(bundle), fake_api()
    path = put(bundle, part, api)
    key = store.read_index(path.parent).engines[path.stem].key
    assert kept_engine(path.parent, path.stem, key) is not None
    assert kept_engine(path.parent, path.stem, replace(key, recipe="another")) is None
    assert kept_engine(path.parent, path.stem, key, 64) is not None
    assert kept_engine(path.parent, path.stem, key, 65) is None
    path.write_bytes(b"cut")
    assert kept_engine(path.parent, path.stem, key) is None


def test_two_builds_at_once_are_told_apart(bundle: Bundle) -> None:
    hold = (
        "import sys,time; from edgevlm.bundle.read import read_bundle; from edgevlm.runtimes.trt.store import locked\n"
    )
    hold += "with locked(read_bundle(sys.argv[1], check=False)): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(bundle.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        words = rf"another `edgevlm build` writes engines here \(process {process.pid}\)"
        with pytest.raises(DeviceError, match=words), locked(bundle):
            pass
    finally:
        process.kill()
        process.communicate()
    with locked(bundle) as folder:
        assert folder == bundle.root / "tensorrt/engines"


def test_a_bundle_is_the_same_with_engines_or_without(bundle: Bundle, tmp_path: Path) -> None:
    before = (bundle.root / "SHA256SUMS").read_bytes()
    put(bundle, part_of(bundle), fake_api())
    os.symlink("/nowhere", bundle.root / "tensorrt/engines/vanishing")
    read_bundle(bundle.root)
    write_sums(bundle.root)
    assert (bundle.root / "SHA256SUMS").read_bytes() == before
    unpacked = unpack(pack(bundle.root, tmp_path / "tiny.tar"), tmp_path / "copy")
    assert not (unpacked.root / "tensorrt/engines").exists()


def test_engines_behind_a_link_are_not_read(bundle: Bundle, tmp_path: Path) -> None:
    part, api = part_of(bundle), fake_api()
    put(bundle, part, api)
    shutil.move(bundle.root / "tensorrt/engines", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", bundle.root / "tensorrt/engines")
    with pytest.raises(UnsupportedError, match="has no engine"):
        find_engine(bundle, part, api, ORIN)
