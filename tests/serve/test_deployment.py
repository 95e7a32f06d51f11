"""Examples of running the server beyond one terminal: containers, Kubernetes, systemd.

No container engine and no cluster is needed: the steps of the container for CPUs are those of its
file, in a folder and an environment of their own, and the rest is held to what the server takes.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_jax.serve import serve_options
from qwen_jax.serve.metrics import Metrics
from tests.support.fake_engine import FakeEngine
from tests.support.launch import LONG, ROOT, free_port

EXAMPLES = ROOT / "examples"
CONTAINERS = EXAMPLES / "containers"
DEPLOYMENTS = [EXAMPLES / "kubernetes" / f"{name}.yaml" for name in ("gpu", "tpu")]
HOSTS = EXAMPLES / "kubernetes" / "tpu_hosts.yaml"
EXTRAS = {"cpu": "", "cuda": "cuda,", "tpu": "tpu,"}
PLATFORMS = {"cpu": {"cpu"}, "cuda": {"cuda", "cpu"}, "tpu": {"tpu", "cpu"}}


def steps(kind: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each with what stands behind it in one line."""
    text = (CONTAINERS / f"{kind}.Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def arguments(kind: str) -> list[str]:
    """What a container runs."""
    found = dict(steps(kind))
    return json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])


def options(words: list[str]) -> Any:
    """The server's options in a command line, as its parser reads them."""
    return serve_options.parser().parse_args(words)


@pytest.mark.parametrize("kind", EXTRAS)
def test_containers_differ_in_their_platform_alone(kind: str) -> None:
    found, cpu = steps(kind), steps("cpu")
    others = [step for step in found if step[0] != "ENV" and not step[1].startswith("pip ")]
    assert others == [s for s in cpu if s[0] != "ENV" and not s[1].startswith("pip ")]
    (install,) = (rest for word, rest in found if word == "RUN" and rest.startswith("pip "))
    assert install == f"pip install --no-cache-dir --editable '.[{EXTRAS[kind]}serve,hub,gcs]'"
    values = dict(pair.split("=", 1) for pair in environment(kind))
    assert set(values["JAX_PLATFORMS"].split(",")) == PLATFORMS[kind]
    assert values["XDG_CACHE_HOME"].startswith(dict(found)["WORKDIR"])
    assert dict(found)["USER"].partition(":")[0] not in ("", "0", "root")
    for word, rest in found:
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest.split()[:-1])
    words = arguments(kind)
    assert words[:3] == ["python", "-m", "qwen_jax.serve"]
    assert options(words[3:]).port == int(dict(found)["EXPOSE"])
    assert f":{dict(found)['EXPOSE']}/health" in dict(found)["HEALTHCHECK"]


def environment(kind: str) -> Iterator[str]:
    for word, rest in steps(kind):
        if word == "ENV":
            yield from shlex.split(rest)


def documents(file: Path) -> dict[str, Any]:
    """The objects of a manifest by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(file.read_text())}


def held_to_the_server(pod: dict[str, Any]) -> None:
    """A pod that has the server: its options, its ports, its probes, its end."""
    (container,) = pod["containers"]
    args = options(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": int(dict(steps("cpu"))["EXPOSE"])} == {"http": args.port}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"] == {"path": "/health", "port": "http"}
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait >= 2 * container["readinessProbe"]["periodSeconds"]
    assert pod["terminationGracePeriodSeconds"] >= wait + args.drain_seconds + 10
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert args.ckpt.startswith(f"{mounts['models']}/")
    assert str(args.api_key_file).startswith(f"{mounts['keys']}/")
    cache = dict(pair.split("=", 1) for pair in environment("tpu"))["XDG_CACHE_HOME"]
    assert mounts["cache"] == cache


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda file: file.stem)
def test_deployments_fit_the_server(file: Path) -> None:
    found = documents(file)
    pod = found["Deployment"]["spec"]["template"]
    held_to_the_server(pod["spec"])
    (port,) = found["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= pod["metadata"]["labels"].items()


def test_hosts_of_a_slice_are_the_processes_of_one_server() -> None:
    found = documents(HOSTS)
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = group["leaderTemplate"], group["workerTemplate"]
    told = {"$(LWS_LEADER_ADDRESS)": "a", "$(LWS_GROUP_SIZE)": str(group["size"])}
    told["$(LWS_WORKER_INDEX)"] = "0"

    def filled(template: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(template["spec"])
        for name, value in told.items():
            text = text.replace(name, value)
        return json.loads(text)

    held_to_the_server(filled(leader))
    (first,), (other,) = leader["spec"]["containers"], worker["spec"]["containers"]
    assert first["args"] == other["args"] and first["resources"] == other["resources"]
    assert leader["spec"]["nodeSelector"] == worker["spec"]["nodeSelector"]
    assert not [key for key in other if key.endswith("Probe")]  # they have no HTTP
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= worker["metadata"]["labels"].items()
    # The leader ends the others when it has drained.
    times = [one["spec"]["terminationGracePeriodSeconds"] for one in (leader, worker)]
    assert times[1] >= times[0] and "lifecycle" not in other


def test_the_systemd_unit_fits_the_server() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    text = (EXAMPLES / "systemd" / "qwen-serve.service").read_text()
    unit.read_string(re.sub(r"\\\n\s*", "", text))
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[1:3] == ["-m", "qwen_jax.serve"]
    args = options(words[3:])
    assert int(service["TimeoutStopSec"]) > args.drain_seconds
    assert service["RestartPreventExitStatus"] == "2"
    name = service["LoadCredential"].partition(":")[0]
    assert str(args.api_key_file) == f"%d/{name}"
    assert f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}" in service["Environment"]


def test_what_the_page_watches_is_told() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bvllm:\w+", page))
    told = Metrics(FakeEngine(lambda prompt, settings: [], stepwise=True), "tiny").text().decode()
    assert len(named) >= 8
    assert [name for name in named if not re.search(rf"^{name}[{{ ]", told, re.M)] == []


def moved(value: str, home: Path) -> str:
    """A value with the container's paths, as they are here."""
    return re.sub(r"(?<![\w/])/srv(?=/|$)", str(home), value)


@pytest.mark.slow
def test_the_steps_of_the_container_for_cpus(tmp_path: Path, chat_dir: Path) -> None:
    """In a folder for its root, and an environment for its Python; the package index is needed."""
    home = tmp_path / "srv"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "python")], check=True)
    path = f"{tmp_path / 'python' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = ("PYTHON", "JAX", "XLA", "VIRTUAL_ENV", "XDG")
    values = {k: v for k, v in os.environ.items() if not k.startswith(own)} | {"PATH": path}
    for word, rest in steps("cpu"):
        if word == "WORKDIR":
            home.mkdir()
            assert moved(rest, home) == str(home)
        elif word == "COPY":
            copy(rest.split(), home)
        elif word == "RUN":
            subprocess.run(moved(rest, home), shell=True, cwd=home, env=values, check=True)
        elif word == "ENV":
            pairs = (pair.split("=", 1) for pair in shlex.split(rest))
            values |= {name: moved(value, home) for name, value in pairs}
    port = str(free_port())
    command = [*arguments("cpu")[:-1], str(chat_dir), "--port", port, "--rows", "2"]
    with subprocess.Popen(command, cwd=home, env=values, stderr=subprocess.PIPE) as server:
        try:
            check = dict(steps("cpu"))["HEALTHCHECK"].partition("CMD ")[2]
            words = json.loads(check.replace("8000", port))
            deadline = time.monotonic() + LONG
            while subprocess.run(words, cwd=home, env=values, capture_output=True).returncode:
                assert server.poll() is None and time.monotonic() < deadline, server.stderr
                time.sleep(0.5)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.stderr is not None
        said = server.stderr.read().decode()
        assert server.wait(LONG) == 0, said
    assert f"at http://127.0.0.1:{port}" in said
    assert any((home / "cache").rglob("*")), "programs are kept in the folder that is a volume"
    before = set(home.rglob("*"))
    assert not [x for x in before if x.name in (".git", ".venv", "tests")]


def copy(words: list[str], home: Path) -> None:
    """COPY: files into a folder, or the contents of one folder into another."""
    *sources, target = words
    for name in sources:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, home / target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, home / target)
