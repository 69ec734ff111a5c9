"""Checkpoints in an object store: against the S3 API on loopback, and in fsspec's memory; stores that fail."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import google.api_core.exceptions
import oci
import pytest
import torch

from moefoundry.callbacks.checkpointing import Checkpointing
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_KEYS
from moefoundry.checkpoint.remote import find_remote, is_downloaded, local_file, upload_checkpoint
from moefoundry.checkpoint.save import write
from moefoundry.checkpoint.start import Start
from moefoundry.checkpoint.store import CheckpointStore
from moefoundry.config import Recipe, UserError
from moefoundry.data import stores
from moefoundry.data.patience import unless_silent
from moefoundry.data.stores import Remote
from tests.distributed import run_distributed
from tests.train.runs import run_recipe

STATE = dict.fromkeys(STATE_KEYS, 0)
Tiny = Callable[..., Recipe]


@pytest.fixture
def memory(tmp_path: Path) -> str:
    """URL of an empty place in fsspec's memory, which is this process's own."""
    return f"memory://{tmp_path.name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)


def saved(root: Path, batch: int) -> Path:
    directory = root / f"ba{batch}"
    directory.mkdir(parents=True)
    write(directory, {"model/weight": torch.full((300,), float(batch))}, STATE)
    return directory


def read(directory: Path) -> float:
    tensors = {"model/weight": torch.zeros(300)}
    read_into(directory, tensors)
    return tensors["model/weight"].unique().item()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_newest_uploaded_checkpoint_is_found_and_read(tmp_path: Path, memory: str, kind: str) -> None:
    url = f"file://{tmp_path / 'store'}" if kind == "file" else f"{memory}/run"
    assert find_remote(url, tmp_path / "cache") is None
    for batch in (9, 10):
        upload_checkpoint(saved(tmp_path / "local", batch), url)
    for place, expected in ((url, 10), (f"{url}/", 10), (f"{url}/ba9", 9)):
        found = find_remote(place, tmp_path / "cache")
        assert found is not None
        assert is_downloaded(found)
        assert not list(found.glob("*.distcp")), "data are downloaded when they are read"
        assert read(found) == expected


def test_of_a_run_directory_its_checkpoints_alone_count(tmp_path: Path, memory: str) -> None:
    """As of one on this machine: not steps that were not finite, nor what was set aside, nor what lies deeper."""
    checkpoint = saved(tmp_path / "local", 9)
    for place in ("nonfinite", "checkpoints/deeper", "other/checkpoints"):
        upload_checkpoint(saved(tmp_path / place, 20), f"{memory}/{place}")
    upload_checkpoint(checkpoint.rename(checkpoint.with_name("ba30.quarantine-0")), f"{memory}/checkpoints")
    assert find_remote(memory, tmp_path / "cache") is None
    upload_checkpoint(saved(tmp_path / "local", 8), f"{memory}/checkpoints")
    upload_checkpoint(saved(tmp_path / "local", 9), f"{memory}/checkpoints")
    upload_checkpoint(saved(tmp_path / "local", 10), memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert (found.name, read(found)) == ("ba9", 9), "directly below, as in a run_dir that is here, comes after these"
    found = find_remote(f"{memory}/nonfinite", tmp_path / "cache")
    assert found is not None
    assert read(found) == 20, "where it is named"


def names(url: str) -> list[str]:
    return sorted(Remote(url).names())


def test_the_manifest_and_then_the_marker_come_last(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, order = saved(tmp_path, 4), []
    upload = Remote.upload

    def spy(self: Remote, file: Path, name: str) -> None:
        upload(self, file, name)
        order.append(name)

    monkeypatch.setattr(Remote, "upload", spy)
    upload_checkpoint(directory, memory)
    assert order[0] == "COMMITTED", "that of an earlier upload is replaced before anything else"
    assert order[-2:] == ["manifest.json", "COMMITTED"]
    assert sorted(order[1:]) == sorted(path.name for path in directory.iterdir()) == [n[4:] for n in names(memory)]


class Failing:
    """Makes the store fail: ``times`` times, wherever ``name`` is uploaded or downloaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, verb: str, name: str, times: int, error: Exception) -> None:
        self.calls = 0
        original: Callable[..., None] = getattr(stores._FsspecStore, verb)

        def unreliable(store: Any, *args: Any) -> None:
            if any(str(argument).endswith(name) for argument in args):
                self.calls += 1
                if self.calls <= times:
                    raise error
            original(store, *args)

        monkeypatch.setattr(stores._FsspecStore, verb, unreliable)


def test_row20_a_store_that_fails_twice_is_asked_again(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path, 4)
    uploads = Failing(monkeypatch, "upload", ".distcp", 2, ConnectionResetError("reset"))
    downloads = Failing(monkeypatch, "download", ".distcp", 2, ConnectionResetError("reset"))
    upload_checkpoint(directory, memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert read(found) == 4
    assert (uploads.calls, downloads.calls) == (3, 3)


@pytest.mark.parametrize("name", [".distcp", "manifest.json", "COMMITTED"])
def test_row20_an_upload_that_fails_for_good_is_no_checkpoint(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    upload_checkpoint(saved(tmp_path, 2), memory)
    failing = Failing(monkeypatch, "upload", name, 99, ConnectionResetError("reset"))
    with pytest.raises(UserError, match=rf"{memory}/ba4/.*{name}: cannot upload \(attempts: 6\): reset"):
        upload_checkpoint(saved(tmp_path, 4), memory)
    assert failing.calls == stores.ATTEMPTS
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert found.name == "ba2", "the latest that is complete"


@pytest.mark.parametrize("uploaded", range(1, 6))
def test_an_upload_over_an_older_one_is_no_checkpoint_until_it_ends(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uploaded: int
) -> None:
    """A batch that is trained once more, after its checkpoint was damaged; whatever its last upload leaves out."""
    for batch in (2, 4):
        upload_checkpoint(saved(tmp_path / "first", batch), memory)
    (again := tmp_path / "again" / "ba4").mkdir(parents=True)
    write(again, {"model/weight": torch.full((300,), 5.0)}, STATE)
    upload, order = Remote.upload, list[str]()

    def dying(self: Remote, file: Path, name: str) -> None:
        if len(order) >= uploaded:
            raise SystemExit("the machine is lost")
        upload(self, file, name)
        order.append(name)

    monkeypatch.setattr(Remote, "upload", dying)
    with pytest.raises(SystemExit):
        upload_checkpoint(again, memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert (found.name, read(found)) == ("ba2", 2)
    said = capsys.readouterr().err
    assert said == f"warning: {memory}/ba4 is passed over:\n  its upload is under way, or did not end\n"
    monkeypatch.setattr(Remote, "upload", upload)
    upload_checkpoint(again, memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert (found.name, read(found)) == ("ba4", 5)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("COMMITTED", b"", "manifest.json: its hash is not the one in COMMITTED"),
        ("manifest.json", b"{}", "manifest.json: its hash is not the one in COMMITTED"),
        ("manifest.json", None, "manifest.json: unreadable checkpoint manifest: No such file"),
        ("state.json", b"{}", "state.json: damaged: has 2 bytes"),
        (".metadata", None, ".metadata: not there"),
        ("__0_0.distcp", None, "__0_0.distcp: not there"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before_it(
    tmp_path: Path, memory: str, capsys: pytest.CaptureFixture[str], name: str, damage: bytes | None, reason: str
) -> None:
    files, root = fsspec.core.url_to_fs(memory)

    def harm(batch: int) -> None:
        files.rm(f"{root}/ba{batch}/{name}") if damage is None else files.pipe(f"{root}/ba{batch}/{name}", damage)

    for batch in (9, 10):
        upload_checkpoint(saved(tmp_path / "local", batch), memory)
    harm(10)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    assert (found.name, read(found)) == ("ba9", 9)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ba9"]
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"warning: {memory}/ba10 is passed over:"
    assert second.startswith(f"  {memory}/ba10/{reason}")
    harm(9)
    for place in (memory, f"{memory}/ba10"):
        with pytest.raises(UserError) as raised:
            find_remote(place, tmp_path / "cache")
        first, second, *_, last = str(raised.value).splitlines()
        assert first == f"{place}: every checkpoint that could be taken is damaged:"
        assert second.startswith(f"  {memory}/ba10/{reason}")
        assert last == "  bring back the files of one of them, or move them away"


def test_row20_a_download_that_fails_for_good_is_named(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_checkpoint(saved(tmp_path, 4), memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    Failing(monkeypatch, "download", ".distcp", 99, TimeoutError("no answer"))
    with pytest.raises(UserError, match=rf"{memory}/ba4/__0_0\.distcp: cannot download \(attempts: 6\): no answer"):
        read(found)
    assert not list(found.glob("*.distcp*")), "nothing half is left"


def test_what_is_missing_or_forbidden_is_not_asked_for_again(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"absent: cannot download \(attempts: 1\)"):
        Remote(memory).download("absent", tmp_path / "absent")
    Failing(monkeypatch, "upload", "secret", 99, PermissionError("forbidden"))
    with pytest.raises(UserError, match=r"secret: cannot upload \(attempts: 1\): forbidden"):
        Remote(memory).upload(tmp_path, "secret")


class Answer(Exception):  # noqa: N818  # clients call theirs as they like
    """What a client raises for an answer over HTTP: each keeps the status elsewhere."""

    def __init__(self, place: str, status: int) -> None:
        super().__init__(f"HTTP {status}")
        response = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
        setattr(self, place, response if place == "response" else status)


@pytest.mark.parametrize("place", ["response", "status", "status_code", "code"])
def test_what_the_caller_is_to_blame_for_is_not_tried_again(
    memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Bad credentials, a bucket that is not there: as botocore, Google, Azure and Oracle say so."""
    for status, attempts in ((400, 1), (401, 1), (403, 1), (404, 1), (408, 6), (429, 6), (500, 6), (503, 6)):
        Failing(monkeypatch, "upload", "name", 99, Answer(place, status))
        with pytest.raises(UserError, match=rf"name: cannot upload \(attempts: {attempts}\): HTTP {status}$"):
            Remote(memory).upload(Path("file"), "name")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (attempts > 1), "one line that it is tried again, not one an attempt"


def test_wrapped_errors_and_missing_credentials_are_known_too() -> None:
    import boto3.exceptions
    import botocore.exceptions

    wrapped = boto3.exceptions.S3UploadFailedError("failed")
    wrapped.__context__ = Answer("response", 403)
    assert stores.is_permanent(wrapped)
    assert stores.is_permanent(botocore.exceptions.NoCredentialsError())
    assert stores.is_permanent(NotImplementedError())
    assert not stores.is_permanent(botocore.exceptions.EndpointConnectionError(endpoint_url="http://host"))
    throttled = botocore.exceptions.ClientError(
        {"Error": {"Code": "RequestTimeout"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "PutObject"
    )
    assert not stores.is_permanent(throttled)


def test_a_store_is_tried_once_when_a_run_starts(
    tmp_path: Path, memory: str, silence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"file://{tmp_path}/a%20place", str(tmp_path / "other place")):
        Remote(url).try_writing()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a place", "other place"]
    assert not list(tmp_path.glob("*/*")), "what was written is removed"
    monkeypatch.setattr(stores, "FIRST_SILENCE", 0.1)
    failing = Failing(monkeypatch, "upload", stores.PROBE, 99, ConnectionResetError("reset"))
    with pytest.raises(UserError, match=rf"{memory}/{stores.PROBE}: cannot upload \(attempts: 1\): reset"):
        Remote(memory).try_writing()
    assert failing.calls == 1
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "S3_ENDPOINT_URL": silence}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"s3://bucket/run: cannot list \(attempts: 1\): nothing has come for 0\.1 sec"):
        Remote("s3://bucket/run").try_reading()


def test_passwords_are_hidden_in_what_a_store_says(memory: str) -> None:
    with pytest.raises(UserError) as error:
        Remote("nowhere://me:pass/word@host/run")
    assert "word" not in str(error.value)
    assert "nowhere://" in str(error.value)


def test_waits_grow(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(stores, "FIRST_WAIT", 1.0)
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    Failing(monkeypatch, "upload", "name", 99, ConnectionResetError("reset"))
    with pytest.raises(UserError):
        Remote(memory).upload(Path("file"), "name")
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "wandb://bucket/run"])
def test_an_unknown_store_is_named(url: str) -> None:
    with pytest.raises(UserError, match=rf"^{url}: no such store: "):
        Remote(url)


def test_a_damaged_download_is_found(tmp_path: Path, memory: str) -> None:
    directory = saved(tmp_path, 4)
    (data,) = directory.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    upload_checkpoint(directory, memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    with pytest.raises(UserError, match="differ from what was saved"):
        read(found)


class FakeGoogle:
    """As much of Google's client as Composer uses, on a dictionary: client, bucket and blob at once."""

    def __init__(self, objects: dict[str, bytes], name: str = "") -> None:
        self.objects, self.name = objects, name

    def get_bucket(self, name: str, timeout: float) -> "FakeGoogle":
        assert name == "bucket"
        return self

    def blob(self, name: str) -> "FakeGoogle":
        return FakeGoogle(self.objects, name)

    def upload_from_filename(self, file: str, retry: object) -> None:
        self.objects[self.name] = Path(file).read_bytes()

    def download_to_filename(self, file: str) -> None:
        if self.name not in self.objects:
            raise google.api_core.exceptions.NotFound(self.name)
        Path(file).write_bytes(self.objects[self.name])

    def list_blobs(self, prefix: str) -> list["FakeGoogle"]:
        return [self.blob(name) for name in self.objects if name.startswith(prefix)]


class FakeOracle:
    """As much of Oracle's client as Composer uses, on a dictionary: client and upload manager at once."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get_namespace(self) -> Any:
        return SimpleNamespace(data="namespace")

    def upload_file(self, namespace_name: str, bucket_name: str, object_name: str, file_path: str) -> None:
        self.objects[object_name] = Path(file_path).read_bytes()

    def head_object(self, namespace: str, bucket: str, name: str) -> Any:
        if name not in self.objects:
            raise oci.exceptions.ServiceError(404, "ObjectNotFound", {}, "absent")
        return SimpleNamespace(headers={"content-length": str(len(self.objects[name]))})

    def get_object(self, namespace_name: str, bucket_name: str, object_name: str, range: str) -> Any:
        first, last = (int(text) for text in range.removeprefix("bytes=").split("-"))
        return SimpleNamespace(data=SimpleNamespace(content=self.objects[object_name][first : last + 1]))

    def list_objects(self, namespace_name: str, bucket_name: str, prefix: str, start: str | None) -> Any:
        """Three a page."""
        names = sorted(name for name in self.objects if name.startswith(prefix) and name >= (start or ""))
        page = [SimpleNamespace(name=name) for name in names[:3]]
        return SimpleNamespace(data=SimpleNamespace(objects=page, next_start_with=next(iter(names[3:]), None)))


@pytest.fixture
def google_and_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    objects: dict[str, dict[str, bytes]] = {"gs": {}, "oci": {}}
    for name in ("GCS_KEY", "GCS_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("google.auth.default", lambda: (None, "project"))
    monkeypatch.setattr("google.cloud.storage.Client", lambda credentials: FakeGoogle(objects["gs"]))
    monkeypatch.setattr("oci.config.from_file", dict)
    for name in ("ObjectStorageClient", "UploadManager"):
        monkeypatch.setattr(f"oci.object_storage.{name}", lambda *args, **kwargs: FakeOracle(objects["oci"]))


@pytest.mark.usefixtures("google_and_oracle")
@pytest.mark.parametrize("scheme", ["gs", "oci"])
def test_composers_other_stores_keep_the_same_contract(tmp_path: Path, scheme: str) -> None:
    """Clients are fakes: what is shown is that our calls, and Composer's answers to them, are what we take them for."""
    url = f"{scheme}://bucket/run"
    assert find_remote(url, tmp_path / "cache") is None
    for batch in (9, 10):
        upload_checkpoint(saved(tmp_path / "local", batch), url)
    found = find_remote(url, tmp_path / "cache")
    assert found is not None
    assert found.name == "ba10"
    assert read(found) == 10
    assert sorted(names(f"{url}/ba9")) == sorted(path.name for path in (tmp_path / "local" / "ba9").iterdir())
    with pytest.raises(UserError, match=rf"{url}/absent: cannot download \(attempts: 1\): .*not found"):
        Remote(url).download("absent", tmp_path / "absent")
    assert not list(tmp_path.glob("absent*"))


@pytest.fixture
def silence() -> Iterator[str]:
    """URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "http://{}:{}".format(*server.getsockname())


def test_row20_a_store_that_never_answers_is_given_up(
    tmp_path: Path, silence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "LONGEST_SILENCE", 0.1)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "S3_ENDPOINT_URL": silence,
    }.items():
        monkeypatch.setenv(name, value)
    store = Remote("s3://bucket/run")
    reason = r"\(attempts: 2\): nothing has come for 0\.1 seconds"
    with pytest.raises(UserError, match=rf"s3://bucket/run/ba4/__0_0\.distcp: cannot download {reason}"):
        store.download("ba4/__0_0.distcp", tmp_path / "__0_0.distcp")
    with pytest.raises(UserError, match=rf"s3://bucket/run: cannot list {reason}"):
        store.names()
    assert not list(tmp_path.iterdir())


def test_a_slow_store_is_waited_for() -> None:
    """As long as anything comes."""
    arrived, enough = iter(range(100)), threading.Event()

    def progress() -> int:
        number = next(arrived)
        if number == 5:
            enough.set()
        return number

    assert unless_silent(lambda: enough.wait(30), progress, 0.01)


def test_what_has_come_is_counted_wherever_a_client_puts_it(tmp_path: Path) -> None:
    partial = tmp_path / "file.1-0.partial"
    (tmp_path / "file.1-0.partial.part").write_bytes(bytes(3))
    folder = tmp_path / "file.1-0.partialfolder"
    before = stores._size_of(partial)
    folder.mkdir()
    (folder / "part-0").write_bytes(bytes(5))
    assert stores._size_of(partial) == before + folder.stat().st_size + 5
    assert stores._size_of(tmp_path / "file.1-1.partial") == 0


def test_a_run_whose_own_upload_cannot_be_loaded_says_what_to_do(tmp_path: Path, memory: str) -> None:
    (data,) = (directory := saved(tmp_path, 4)).glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    upload_checkpoint(directory, memory)
    found = find_remote(memory, tmp_path / "cache")
    assert found is not None
    run, saver = SimpleNamespace(load=lambda *args: read(found)), SimpleNamespace(store=CheckpointStore(tmp_path))
    remedy = f"if moefoundry checkpoint verify {memory}/ba4 finds it damaged, move it away there: the run then goes on"
    with pytest.raises(UserError, match=rf"__0_0\.distcp: offset \d+, tensor model/weight: damaged: .*; {remedy}"):
        Checkpointing(run, saver, "1ba", False, Start(found)).after_load(None, None)
    with pytest.raises(UserError, match=r"damaged: [^;]*$"):
        Checkpointing(run, saver, "1ba", False, Start(found, own=False)).after_load(None, None)


def through_s3(environment: dict[str, str], root: Path, url: str) -> list[str]:
    """Save on one mesh, upload, download and load on another; which files this rank has downloaded."""
    import os

    from moefoundry.checkpoint import reading
    from moefoundry.checkpoint.ranks import on_rank_zero
    from tests.checkpoint.meshes import local, state_on
    from tests.checkpoint.test_load import save

    os.environ.update(environment)  # ranks are forked from a server that was started before the store
    for batch in (9, 10):
        save(root / f"ba{batch}", state_on((1, 4, 1)))
        on_rank_zero(lambda number=batch: upload_checkpoint(root / f"ba{number}", url))
    found = on_rank_zero(lambda: find_remote(url, root / "cache"))
    assert found.name == "ba10"
    mine: list[str] = []
    reading.local_file = lambda place, name: (mine.append(name), local_file(place, name))[1]
    tensors = state_on((2, 2, 2))
    expected = {name: local(tensor).clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        local(tensor).zero_()
    read_into(found, tensors)
    assert all(torch.equal(local(tensor), expected[name]) for name, tensor in tensors.items())
    return mine


@pytest.mark.slow
def test_on_s3_only_the_first_copy_downloads(tmp_path: Path, s3: dict[str, str]) -> None:
    downloads = run_distributed(through_s3, 4, s3, tmp_path, "s3://bucket/run")
    assert sorted(downloads[0] + downloads[1]) == [f"__{rank}_0.distcp" for rank in range(4)]
    assert downloads[2:] == [[], []]


STEPS = ("max_duration=6ba", "save_interval=2ba", "save_num_checkpoints_to_keep=-1")


def test_a_run_goes_on_from_a_url(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Bit for bit; and where the run's own directory is lost, ``autoresume`` finds what has been uploaded."""
    url = f"file://{tmp_path / 'store'}"
    whole = run_recipe(tiny_recipe(tmp_path / "whole", *STEPS, f"save_remote={url}"))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["ba2", "ba4", "ba6"]
    resumed = run_recipe(tiny_recipe(tmp_path / "resumed", *STEPS, f"load_path={url}/ba2"))
    assert resumed.exact() == whole.exact(3)
    assert not (resumed.run_dir / "downloads").exists(), "a file:// URL is a path, and read where it lies"
    for name in ("ba4", "ba6"):
        (tmp_path / "store" / name / "COMMITTED").unlink()
    lost = run_recipe(tiny_recipe(tmp_path / "lost", *STEPS, f"save_remote={url}", "autoresume=true"))
    assert lost.exact() == whole.exact(3)
    assert json.loads((tmp_path / "store" / "ba6" / "state.json").read_text())["world_size"] == 1


def test_a_url_without_a_checkpoint_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"load_path: no complete checkpoint at {tmp_path}/none"):
        run_recipe(tiny_recipe(tmp_path / "run", *STEPS, f"load_path=file://{tmp_path}/none"))
