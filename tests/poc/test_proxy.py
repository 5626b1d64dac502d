"""A hospital whose only way out is an HTTP proxy: what the guide says of it, with real processes and mutual TLS.

The sites reach the server under a name that only the proxy knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from connect_proxy import ConnectProxy
from deployed import FEDERATION, PROJECT, Federation, free_port, wait_for

from pfedsam.deployment.admin import connect
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.deployment.site_check import check_kit

pytestmark = pytest.mark.slow
HOST = "fl.federation.test"
#: `Proxy-Authorization` of user:secret.
BASIC = "Basic dXNlcjpzZWNyZXQ="


def project(folder: Path, scheme: str) -> Path:
    """The project of the guide with another name of the server, and a scheme."""
    content = yaml.safe_load(PROJECT.read_text())
    (static,) = [one for one in content["builders"] if one["path"].endswith("StaticFileBuilder")]
    static["args"]["scheme"] = scheme
    for participant in content["participants"]:
        if participant["type"] == "server":
            participant["host_names"] = [HOST]
        elif participant["type"] == "client":
            participant["connect_to"] = HOST
    (folder / "project.yml").write_text(yaml.safe_dump(content))
    return folder / "project.yml"


@contextmanager
def behind_a_proxy(
    folder: Path, data: list[Path], scheme: str, password: str | None = None
) -> Iterator[tuple[Deployment, ConnectProxy]]:
    """A server, and sites that are told of the proxy by `https_proxy` alone, as a service file does it."""
    port = free_port()
    proxy = ConnectProxy(port, password)
    url = proxy.url.replace("//", "//user:secret@") if password else proxy.url
    deployment = Deployment(folder / "runtime", project(folder, scheme), port)
    deployment.provision()
    deployment.init(dict(zip(deployment.sites, data, strict=True)), {"federations": [FEDERATION]})
    try:
        deployment.start([deployment.server], {OUTCOME_VARIABLE: "10"})
        deployment.start(deployment.sites, {"https_proxy": url, "HTTPS_PROXY": "", "no_proxy": ""})
        yield deployment, proxy
    finally:
        proxy.close()
        assert deployment.stop() == []
        deployment.require_free_port()


def test_a_federation_with_the_scheme_grpc_runs_through_a_proxy_that_asks_for_a_password(
    tmp_path: Path, phantom: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        behind_a_proxy(tmp_path, phantom, "grpc", BASIC) as (deployment, proxy),
        connect(deployment.admin()) as session,
    ):
        deployment.wait(session)
        with monkeypatch.context() as shell:
            shell.setenv("https_proxy", proxy.url.replace("//", "//user:secret@"))
            (found,) = [one for one in check_kit(deployment.kit(deployment.sites[0])) if one.name == "server"]
        assert found.fine and "through the proxy" in found.message and "secret" not in found.message
        federation = Federation(deployment, {}, session, tmp_path)
        result = federation.run(federation.job(rounds=1), timeout=400)
        assert result.completed, result.problem()
        assert set(proxy.asked) == {f"{HOST}:{deployment.port}"} and proxy.refused == []
        states = federation.states()
        assert set(states) == set(deployment.sites) and all(entry.info["final"] for entry in states.values())
        # the models went this way: two sites, there and back
        model = result.file("global_model.safetensors")
        assert model is not None and proxy.bytes > 2 * model.stat().st_size


@pytest.mark.parametrize("scheme", ["http", "tcp"])
def test_the_other_schemes_do_not_ask_a_proxy(scheme: str, tmp_path: Path, phantom: list[Path]) -> None:
    """If this changes in NVFlare, the guide may say less."""
    with behind_a_proxy(tmp_path, phantom, scheme) as (deployment, proxy):
        for site in deployment.sites:
            wait_for(lambda name=site: "failed with exception" in deployment.log(name).read_text(), 90)
        assert proxy.asked == [] and proxy.refused == []
