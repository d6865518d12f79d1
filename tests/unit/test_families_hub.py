"""Names of models, and the hub: a small server of our own stands in for it, the hub's library is the real one."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.core.errors import InputError, MissingLibraryError, UnsupportedError, UsageError
from edgevlm.export.precisions import precisions
from edgevlm.export.provenance import Calibration, provenance
from edgevlm.families.card import make_card
from edgevlm.families.folder import ModelFolder
from edgevlm.families.hub import find_model, hub_id
from edgevlm.families.licence import read_licence
from edgevlm.models.checkpoint import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"
REPOSITORY = "someone/tiny-vlm"
ERRORS = {"gated": (403, "GatedRepo"), "nothing": (401, "RepoNotFound"), "broken": (503, "")}


class Hub(ThreadingHTTPServer):
    """Serves the files of ``folder`` as revision main and v1 of one repository; ``asked`` is what was fetched."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        owner_and_name = path.removeprefix("api/models/").split("/")[:2]
        if owner_and_name != REPOSITORY.split("/"):
            status, code = ERRORS.get(owner_and_name[1], ERRORS["nothing"])
            return self.reply(b"", status, {"X-Error-Code": code})
        rest = path.partition(f"{REPOSITORY}/")[2]
        if rest in ("revision/main", "revision/v1"):
            commit = COMMIT if rest.endswith("main") else OTHER
            return self.reply_json({"id": REPOSITORY, "sha": commit, "siblings": []})
        if rest.startswith("tree/"):
            return self.reply_json([self.entry(name) for name in self.server.files])
        if rest.startswith("resolve/"):
            return self.reply_file(rest.split("/", 2)[1], rest.split("/", 2)[2])
        return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})

    def entry(self, name: str) -> dict[str, object]:
        data = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def reply_file(self, commit: str, name: str) -> None:
        data = (self.server.folder / name).read_bytes()
        if self.command == "GET":
            self.server.asked.append(name)
        self.reply(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})

    def reply_json(self, value: object) -> None:
        self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def reply(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The tiny checkpoint on a hub, with much beside it that is of no use."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "served"))
    (folder / "LICENSE").write_text("Some Licence\n\nFor research purposes.\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"once more")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")[2]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}{template}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()  # a client that was made offline stays so
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("apple/FastVLM-0.5B", "apple/FastVLM-0.5B", None),
        ("a/b@v1.0", "a/b", "v1.0"),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
    ],
)
def test_a_hub_id_is_owner_and_name(name: str, repository: str, revision: str | None) -> None:
    found = hub_id(name)
    assert found is not None
    assert (found.repository, found.revision) == (repository, revision)


@pytest.mark.parametrize(
    "name",
    [
        *("nano", "nanu", "nano@v1", "./a/b", "../b", "/a/b", "~/b", "a/b/c", "a/", "/b", "a//b", "a/b ", "a b/c"),
        *("a/..", "a/b..c", "a/b--c", "-a/b", "a/b-", "a/b.", "a/b.bundle", "a/config.json", "a\\b/c", "a/b@", "ä/b"),
        "a/" + "b" * 96,
    ],
)
def test_what_is_no_hub_id_never_becomes_one(name: str) -> None:
    assert hub_id(name) is None


def test_a_path_that_exists_always_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") is None
    assert hub_id(Path("owner/other")) is None
    assert hub_id("owner/other") is not None
    with pytest.raises(InputError, match="a folder without config"):
        find_model("owner/name")


def test_a_typo_of_a_shipped_name_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UnsupportedError, match="Did you mean 'nano'"):
        find_model("nanu")
    with pytest.raises(InputError, match="does not exist: give a checkpoint's folder"):
        find_model("./checkpoints/nano")


def test_only_what_is_needed_is_fetched_and_only_once(hub: Hub, tiny_checkpoint: Path) -> None:
    found = find_model(REPOSITORY)
    assert (found.name, found.source, found.revision) == ("tiny-vlm", REPOSITORY, COMMIT)
    needed = {path.name for path in tiny_checkpoint.iterdir()} | {"LICENSE"}
    assert sorted(hub.asked) == sorted(needed)
    assert sorted(path.name for path in found.folder.iterdir()) == sorted(needed)
    find_model(REPOSITORY)
    assert len(hub.asked) == len(needed)


def test_a_model_of_the_hub_loads_and_says_where_it_is_from(hub: Hub) -> None:
    checkpoint = load_model(f"{REPOSITORY}@v1")
    assert (checkpoint.name, checkpoint.source, checkpoint.revision) == ("tiny-vlm", REPOSITORY, OTHER)
    served = hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()
    facts = provenance(checkpoint, None, precisions("fp32", "fp32"), Calibration())
    assert (facts["source"], facts["revision"]) == (REPOSITORY, OTHER)
    assert facts["weights"] == {"model.safetensors": served}


def test_the_cache_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nor whole in the hub's cache, and this is offline"):
        find_model(REPOSITORY, offline=True)
    folder = find_model(REPOSITORY).folder
    hub.asked.clear()
    assert find_model(REPOSITORY, offline=True).folder == folder
    assert find_model(REPOSITORY, revision=COMMIT, offline=True).revision == COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert find_model(REPOSITORY).folder == folder
    assert hub.asked == []
    with pytest.raises(InputError, match="this is offline"):
        find_model(f"{REPOSITORY}@v1")


def test_configs_come_without_weights_where_that_is_enough(hub: Hub) -> None:
    folder = find_model(REPOSITORY, weights=False).folder
    assert (folder / "config.json").is_file()
    assert "model.safetensors" not in hub.asked
    with pytest.raises(InputError, match="this is offline"):
        find_model(REPOSITORY, offline=True)


def test_an_unknown_family_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    (hub.folder / "config.json").write_text('{"model_type": "edgevln"}')
    with pytest.raises(UnsupportedError, match="Did you mean 'edgevlm'"):
        find_model(REPOSITORY)
    assert "model.safetensors" not in hub.asked


def test_shards_are_fetched_by_their_index(hub: Hub) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "model-1.safetensors")
    (hub.folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    find_model(REPOSITORY)
    assert "model-1.safetensors" in hub.asked


def test_a_repository_of_pickles_is_refused(hub: Hub) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors; pickled weights are never fetched"):
        find_model(REPOSITORY)
    assert "pytorch_model.bin" not in hub.asked


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("someone/gated", "is gated: accept its terms .* then log in"),
        ("someone/nothing", "neither a folder here nor a public repository"),
        (f"{REPOSITORY}@v2", "has no revision 'v2'"),
        ("someone/broken", "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(hub: Hub, name: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        find_model(name)


def test_no_network_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub cannot be reached \(.*\): give a folder, or go online"):
        find_model(REPOSITORY)


def test_without_the_library_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> object:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("edgevlm.core.optional.import_module", absent)
    with pytest.raises(MissingLibraryError, match=r"pip install 'edgevlm\[workshop\]'"):
        find_model(REPOSITORY)


def test_a_revision_belongs_to_a_hub_id_and_is_said_once() -> None:
    with pytest.raises(UsageError, match="nano is no hub id"):
        find_model("nano", revision="main")
    with pytest.raises(UsageError, match="give one of the two"):
        find_model("a/b@v1", revision="v2")


def as_llava(hub: Hub, names: list[str], **config: object) -> None:
    """LLaVA's layout as it lies on the hub, in two shards that nobody has fetched."""
    decoder = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    decoder |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tower = {"mm_vision_tower": "openai/clip-vit-base-patch32", "mm_projector_type": "mlp2x_gelu"}
    (hub.folder / "config.json").write_text(json.dumps({**decoder, "rms_norm_eps": 1e-5, **tower, **config}))
    (hub.folder / "model.safetensors").unlink()
    index = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


VISION = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "llava_llama"}, 49),
        ({"model_type": "llava", "num_visual_tokens": 9}, 9),
        ({"model_type": "llava_mini_llama", "compressor_size": 3}, 9),
    ],
)
def test_a_card_takes_the_index_and_no_shard(hub: Hub, config: dict[str, object], tokens: int) -> None:
    as_llava(hub, [VISION, "model.compressor.query", "model.embed_tokens.weight"], **config)
    result = CliRunner().invoke(app, ["inspect", f"{REPOSITORY}@v1", "--json"])
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert (card["name"], card["vision_tokens"]) == ("tiny-vlm", tokens)
    assert not any(name.endswith(".safetensors") for name in hub.asked)


def test_an_index_without_the_vision_encoder_is_told_before_a_shard_is_fetched(hub: Hub) -> None:
    as_llava(hub, ["model.embed_tokens.weight"], model_type="llava_llama")
    with pytest.raises(UnsupportedError, match="the weights of the vision encoder"):
        make_card(ModelFolder(find_model(REPOSITORY, weights=False).folder))


def test_inspect_takes_a_revision_from_the_cache(hub: Hub) -> None:
    arguments = ["inspect", REPOSITORY, "--offline", "--json"]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert CliRunner().invoke(app, ["inspect", REPOSITORY, "--revision", "main"]).exit_code == 0
    hub.asked.clear()
    result = CliRunner().invoke(app, arguments)
    assert json.loads(result.stdout)["name"] == "tiny-vlm"
    assert hub.asked == []


def test_every_text_of_a_licence_is_fetched_and_nothing_that_runs(hub: Hub) -> None:
    texts = {"COPYING", "ACKNOWLEDGEMENTS.txt", "Acknowledgments", "Licence.md", "use_policy.md", "NOTICE"}
    for name in (*texts, "license.py", "LICENSE.bin"):
        (hub.folder / name).write_text("x")
    found = read_licence(find_model(REPOSITORY, weights=False).folder)
    assert found is not None
    assert set(found.files) == {"LICENSE", *texts}
    assert {"license.py", "LICENSE.bin"}.isdisjoint(hub.asked)
