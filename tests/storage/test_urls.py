"""URLs of object stores: what is taken, and that a secret in one goes nowhere but to its store."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import uuid
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

import numpy as np
import pytest
from s3_server import S3Server, serving
from shell import Shell, shell
from stub_trainer import begun, end_step

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback
from flax_partial.cli.main import WRONG_USE
from flax_partial.runs import takeover
from flax_partial.storage.urls import HIDDEN, parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["shell"]


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///x", "gs://b//x", "gs://b/../x", "s3://b/x\n", "memory://b/./x"],
)
def test_urls_that_name_nothing_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="does not name a place in an object store"):
        fp.StorePath(url)


@pytest.mark.parametrize(
    ("url", "name", "appended"),
    [
        ("s3://b/run?region=eu-north-1", "region", "5"),
        ("s3://b/run?region=eu-north-1", "region", "best"),
        ("s3://b/run?region=x&endpoint=http://127.0.0.1:9000", "endpoint", "5"),
        ("s3://b/run?endpoint=http://127.0.0.1:9000", "endpoint", "0005.partial_save"),
        ("gs://b/run?service_account=/home/me/key.json", "service_account", "5"),
    ],
)
def test_what_is_appended_to_parameters_is_refused(url: str, name: str, appended: str) -> None:
    for call in (fp.load, fp.steps, lambda url: fp.save(url, {"a": 1})):
        with pytest.raises(ValueError, match=rf"belongs to '{name}'.*StorePath\(url\) / '") as told:
            call(f"{url}/{appended}")
        assert repr(f"/{appended}") in str(told.value)
    assert str(fp.StorePath(url) / appended).endswith(f"{appended}?{url.partition('?')[2]}")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost", "ftp://host", ""])
def test_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="has to begin with http"):
        fp.load(f"s3://b/run/12?endpoint={endpoint}")


@pytest.mark.parametrize(
    "query",
    [
        *("endpoint=https://gateway/s3", "service_account=/home/me/key.json"),
        *("session_token=a/b", "endpoint=http://127.0.0.1:9000&region=a"),
    ],
)
def test_parameters_that_hold_slashes_are_taken(query: str) -> None:
    assert parse(f"s3://b/run?{query}").query == query


def test_a_path_works_like_a_path() -> None:
    name = uuid.uuid4().hex
    path = fp.StorePath(f"memory://{name}/run?region=y") / "12"
    assert str(path) == f"memory://{name}/run/12?region=y"
    assert (path.name, path.parent.name) == ("12", "run")
    assert path == fp.StorePath(str(path))
    assert len({path, fp.StorePath(path)}) == 1
    assert [one.name for one in path.parents] == ["run", ""]
    assert path.with_name("13") > path
    with pytest.raises(TypeError, match="in an object store"):
        open(path).close()  # noqa: PTH123


SECRET = "qX7/s3cr3t+9="  # noqa: S105 - it opens nothing
KEYS = {"secret_access_key": "s3cr3t", "session_token": "s3cr3t"}
# Under each name by which obstore takes one; and under names that it does not know.
SECRETS = [
    *(
        ("s3", f"{prefix}{name}")
        for prefix in ("", "aws_", "AWS_")
        for name in (
            *("secret_access_key", "session_token", "token", "sse_customer_key_base64"),
            *("container_credentials_full_uri", "container_credentials_relative_uri"),
        )
    ),
    *(
        ("gs", f"{prefix}{name}")
        for prefix in ("", "google_", "GOOGLE_")
        for name in (
            *("service_account", "service_account_key", "application_credentials", "bearer_token"),
        )
    ),
    *(
        ("az", f"{prefix}{name}")
        for prefix in ("", "azure_storage_", "AZURE_STORAGE_")
        for name in (
            *("account_key", "access_key", "master_key", "sas_key", "sas_token", "token"),
            *("client_secret", "encryption_key"),
        )
    ),
    *(("az", name) for name in ("azure_client_secret", "bearer_token", "fabric_session_token")),
    *(("az", name) for name in ("azure_fabric_session_token", "sig")),
    *(("s3", name) for name in ("sceret_acess_kee", "X-Amz-Signature", "proxy_password")),
    ("gs", "token"),
]


@pytest.mark.parametrize(("scheme", "name"), SECRETS)
def test_a_secret_among_the_parameters_is_not_shown(scheme: str, name: str) -> None:
    url = f"{scheme}://bucket/run?region=r&{name}={quote(SECRET, safe='')}"
    shown = f"{scheme}://bucket/run?region=r&{name}={HIDDEN}"
    path = fp.StorePath(url)
    assert (f"{path}", repr(path), repr(parse(url))) == (
        shown,
        f"StorePath({shown!r})",
        repr(shown),
    )
    assert str((path / "12" / "a").parent) == str(path / "12") == shown.replace("run", "run/12")
    wrongs = [
        f"{url}/5",
        url.replace("bucket/run", "bucket//run"),
        f"{url}&skip_signature=true&nonsense=1",
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=re.escape(HIDDEN)) as told:
            fp.load(wrong)
        assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize("name", ["service_account", "google_application_credentials"])
@pytest.mark.parametrize("key", ["s3cr3t", '{"private_key":\n  "s3cr3t"}', ""])
def test_a_key_where_the_name_of_its_file_belongs_is_not_told(name: str, key: str) -> None:
    url = f"gs://{uuid.uuid4().hex}/run"
    fp.store_options(url, **{name: key})
    for one in (url, f"{url}?{name}={quote(key)}"):
        with pytest.raises(ValueError, match="service account file from") as told:
            fp.load(one)
        assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize("prefix", ["", "aws_", "AWS_"])
@pytest.mark.parametrize("endpoint", ["endpoint", "endpoint_url", "endpoint_url_s3"])
def test_names_with_a_prefix_are_taken_and_count_as_those_without(
    server: S3Server, prefix: str, endpoint: str
) -> None:
    url = server.url()
    given = dict(parse_qsl(url.partition("?")[2]))
    fp.store_options(url.partition("?")[0], endpoint="http://127.0.0.1:9", aws_region="elsewhere")
    query = {f"{prefix}{endpoint}": given.pop("endpoint")}
    query |= {f"{prefix}{name}": value for name, value in given.items()}
    fp.save(f"{url.partition('?')[0]}?{urlencode(query)}", {"w": 1})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://b?endpoint=https://u:s3cr3t@host", "s3://b?endpoint=***"),
        ("s3://b?endpoint=https%3A%2F%2Fu%3As3cr3t%40host", "s3://b?endpoint=***"),
        ("az://b?endpoint=https://host/?sig=s3cr3t", "az://b?endpoint=***"),
        ("az://b?sas_token=sv=1&sig=s3cr3t", "az://b?sas_token=***&sig=***"),
        ("az://b?account_name=a&s3cr3t", "az://b?account_name=a&***"),
    ],
)
def test_a_secret_in_a_value_is_not_shown(url: str, shown: str) -> None:
    assert str(fp.StorePath(url)) == shown


@pytest.mark.parametrize(
    "query",
    [
        "region=eu&endpoint=http://127.0.0.1:1&access_key_id=k&virtual_hosted_style_request=true",
        "aws_skip_signature=true&unsigned_payload=true&AWS_DEFAULT_REGION=eu&disable_tagging=true",
        "service_account=/home/me@x/key.json&skip_signature=true",
        "account_name=a&use_emulator=true&azure_client_id=x&federated_token_file=/token",
    ],
)
def test_what_is_no_secret_is_shown(query: str) -> None:
    path = fp.StorePath(f"s3://b/run?{query}")
    assert str(path) == f"s3://b/run?{query}"
    assert fp.StorePath(str(path)) == path


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:s3cr3t@bucket/run",
        "s3://key:s3cr3/t@bucket/run",
        "S3://bucket/run?secret_access_key=s3cr3t",
        "https://u:s3cr3t@host/run?sig=s3cr3t",
    ],
)
def test_urls_that_are_not_taken_show_no_secret(url: str) -> None:
    for call in (fp.load, fp.steps, PartialCheckpointCallback):
        with pytest.raises(ValueError, match=r"bucket's name|not served here") as told:
            call(url)
        assert "s3cr3" not in str(told.value)


def test_a_path_with_a_hidden_secret_is_refused_and_the_path_itself_works(server: S3Server) -> None:
    path = fp.StorePath(server.url(**KEYS))
    for one in (path, copy.deepcopy(path), path / "x", (path / "x").with_name("y")):
        fp.save(one, {"w": np.ones(3)})
        fp.finalize(one)
        assert fp.load(one)["w"].sum() == 3
        for call in (fp.load, fp.status, fp.StorePath):
            with pytest.raises(ValueError, match="Pass the StorePath itself"):
                call(str(one))
        fp.remove(one)


def test_what_a_run_records_and_says_has_no_secret(
    server: S3Server,
    tmp_path: Path,
    shell: Shell,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Logs, reports, errors, records in both tiers, and what each command prints."""
    caplog.set_level(logging.DEBUG, "flax_partial")
    url = server.url("/run", **KEYS)
    said: list[object] = []
    for local in (tmp_path / "tier", tmp_path / "tier", None):
        callback = PartialCheckpointCallback(
            url, local=local, every_n_train_steps=1, every_n_epochs=None
        )
        found = callback.restore()
        trainer = begun(callback)
        end_step(callback, trainer, found[1] + 1 if found else 1)
        said.append(callback.save_now(trainer))
        callback.on_train_end(trainer, None)
        said += [callback, callback.reports, callback.best_model_path, vars(callback._member)]  # noqa: SLF001
    run = fp.StorePath(url)
    said += [fp.save(run / "9", {"w": np.ones(3)}), fp.status(run / "9"), fp.latest(run)]
    said += [fp.finalize(run / "9"), fp.metadata(run / "9"), fp.verify(run / "9")]
    for call in (fp.finalize, fp.abort, lambda path: fp.save(path, {"w": 1}), fp.load):
        with pytest.raises((fp.CheckpointExistsError, fp.NoSessionError)) as told:
            call(run / ("8" if call is fp.load else "9"))
        said.append(told.value)
    fp.save(run / "10", {"w": np.ones(3)}, custom_metadata={"step": 10})
    step = url.replace("/run?", "/run/9?")
    for command in (
        *(("ls", url), ("latest", url), ("show", url), ("show", step), ("status", url)),
        *(("verify", url), ("timeline", url), ("diff", step, step)),
        *(
            ("export", step, tmp_path / "x.safetensors"),
            ("finalize", url.replace("run?", "run/10?")),
        ),
        ("import", tmp_path / "x.safetensors", url.replace("/run?", "/run/11?")),
        *(("rm", step, "--yes"), ("prune", url, "--keep-last", "1", "--yes")),
    ):
        said += [shell.json(*command), shell.error]
    for command in (
        *(("show", step), ("rm", url), ("ls", url.replace("/run?", "/runs?")), ("ls", url, url)),
        *(("show", f"{url}/5"), ("ls", str(run)), ("timeline", step), (url,), ("finalize", url)),
        *(("export", url, "x", url), ("import", url, step)),
    ):
        with contextlib.suppress(SystemExit):
            shell.run(*command, status=WRONG_USE)
        said.append(shell.error)
    files = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    everything = f"{said} {caplog.text} {files} {server.objects}"
    assert "s3cr3t" not in everything
    assert HIDDEN in everything


@pytest.fixture
def server() -> Iterator[S3Server]:
    with serving() as one:
        fp.store_options("s3://bucket", region="us-east-1", access_key_id="testkey")
        yield one


def test_a_tier_that_recorded_a_secret_is_still_that_of_its_run(tmp_path: Path) -> None:
    for recorded, given in (
        ("s3://b/run?secret_access_key=s3cr3t", "s3://b/run"),
        ("s3://b/run", "s3://b/run?session_token=s3cr3t"),
    ):
        (tmp_path / "timeline").mkdir(exist_ok=True)
        value = {"id": "7", "directory": recorded}
        (tmp_path / "timeline" / "tier.json").write_text(json.dumps(value))
        assert takeover.identify(tmp_path, fp.StorePath(given)) == "7"
        with pytest.raises(fp.CheckpointExistsError, match=r"tier of s3://b/run, not") as told:
            takeover.identify(tmp_path, fp.StorePath(given.replace("run", "runs")))
        assert "s3cr3t" not in str(told.value)
