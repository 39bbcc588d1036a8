"""The Helm chart: what it makes fits Kubernetes' schemas, runs as nobody, and names settings that there are."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from preservarium.cli.monitoring.alerts import RECORDED
from preservarium.cli.monitoring.names import used
from preservarium.settings import fields

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy" / "helm" / "preservarium"
VARIABLES = {f.variable for f in fields()}
KUBERNETES = ("1.25", "1.30", "1.34")
EVERYTHING = (
    "autoscaling.enabled=true,serviceMonitor.enabled=true,connectorMqtt.enabled=true,ingress.enabled=true,ingress.host=iot.example",
    "ingress.tlsSecret=t,tlsSecret=ca,worker.state.storageClassName=fast,podLabels.a=b,serviceAccount.annotations.role=x",
    "secretFiles[0].setting=POSTGRES__PASSWORD,secretFiles[0].secret=s,secretFiles[0].key=k",
    "imagePullSecrets[0].name=registry,worker.nodeSelector.disk=ssd,worker.allowedHosts[0]=plant.example",
)
VARIANTS = {
    "as it is": (),
    "everything": EVERYTHING,
    "nothing besides workers": (
        "connectorHttp.enabled=false,migrate.enabled=false,podDisruptionBudget.enabled=false,networkPolicy.enabled=false,serviceAccount.create=false",
    ),
}


@pytest.fixture(scope="module")
def helm() -> str:
    found = shutil.which("helm") or shutil.which("helm", path=str(Path.home() / ".cache/preservarium/tools"))
    if found is None:
        pytest.skip("missing: helm (its binary on the PATH, or `make tools`)")
    return found


def run(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the user's own Helm.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HELM_")} | {
        "HELM_CACHE_HOME": "/nonexistent"
    }
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment)


def made(helm: str, sets: tuple[str, ...], kubernetes: str = "1.30") -> list[dict[str, Any]]:
    options = [part for each in sets for part in ("--set", each)]
    done = run(
        helm, "template", "iot", str(CHART), "--namespace", "plant", "--kube-version", f"{kubernetes}.0", *options
    )
    assert done.returncode == 0, done.stderr
    return [document for document in YAML(typ="safe").load_all(done.stdout) if document]


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_chart_makes_fits_kubernetes_schemas(helm: str, variant: str, kubernetes: str) -> None:
    import kubernetes_validate

    documents = made(helm, VARIANTS[variant], kubernetes)
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    assert ("StatefulSet", "iot-preservarium") in names
    for document in documents:
        if "." in document["apiVersion"].split("/")[0] and not document["apiVersion"].split("/")[0].endswith(".k8s.io"):
            continue  # of KEDA and the Prometheus operator: their schemas are not Kubernetes'
        kubernetes_validate.validate(document, kubernetes, strict=True)


def test_helm_has_nothing_against_it(helm: str) -> None:
    done = run(helm, "lint", "--strict", str(CHART), "--kube-version", "1.30.0")
    assert done.returncode == 0, done.stdout + done.stderr


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for d in documents if d["kind"] in ("StatefulSet", "Deployment", "Job")]


def test_every_pod_runs_as_nobody_with_limits_and_a_root_that_it_cannot_write(helm: str) -> None:
    found = pods(made(helm, EVERYTHING))
    assert len(found) == 4
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
            assert context["capabilities"] == {"drop": ["ALL"]}
            for kind in ("requests", "limits"):
                assert set(container["resources"][kind]) == {"cpu", "memory"}
            places = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/tmp", "/data"} <= places  # what it must write to
            volumes = {v["name"] for v in pod["volumes"]} | {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_every_variable_is_a_setting_and_no_secret_is_in_the_environment(helm: str) -> None:
    documents = made(helm, EVERYTHING)
    (config,) = [d for d in documents if d["kind"] == "ConfigMap"]
    assert set(config["data"]) <= VARIABLES
    hosts = config["data"]["PRESERVARIUM_WEB__ALLOWED_HOSTS"].split(",")
    assert {
        "iot-preservarium",
        "iot-preservarium-http",
        "iot.example",
        "plant.example",
        "iot-preservarium.plant.svc",
    } <= set(hosts)
    for pod in pods(documents):
        for container in pod["containers"]:
            assert container["env"] == [
                {
                    "name": "PRESERVARIUM_POSTGRES__PASSWORD_FILE",
                    "value": "/run/secrets/preservarium/POSTGRES__PASSWORD",
                }
            ]
            assert {e["name"].removesuffix("_FILE") for e in container["env"]} <= VARIABLES


@pytest.mark.parametrize(
    "wrong",
    ["settings.POSTGRES__PASSWORD=x", "settings.WEB__OPERATOR_TOKEN=x", "settings.lower=x", "nothing=x", "worker.replicas=-1",
     "worker.terminationGracePeriodSeconds=5", "ingress.enabled=true"],
)  # fmt: skip
def test_what_would_not_work_is_refused(helm: str, wrong: str) -> None:
    assert run(helm, "template", "iot", str(CHART), "--kube-version", "1.30.0", "--set", wrong).returncode != 0


def test_workers_scale_by_what_they_measure(helm: str) -> None:
    documents = made(helm, (*EVERYTHING, "autoscaling.max=40"))
    (scaled,) = [d for d in documents if d["kind"] == "ScaledObject"]
    (workers,) = [d for d in documents if d["kind"] == "StatefulSet"]
    spec = scaled["spec"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": workers["metadata"]["name"],
    }
    assert "replicas" not in workers["spec"], "an upgrade would set back what the autoscaler chose"
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 12)  # no more than partitions
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert {p["periodSeconds"] for p in behaviour["scaleUp"]["policies"]} == {300}
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == 600
    queries = [t["metadata"]["query"] for t in spec["triggers"] if t["type"] == "prometheus"]
    recorded = {r.name for r in RECORDED}
    assert all(query in recorded or used(query) for query in queries)
    (monitor,) = [d for d in documents if d["kind"] == "ServiceMonitor"]
    service = next(d for d in documents if d["kind"] == "Service" and d["metadata"]["name"] == "iot-preservarium")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    headless = next(
        d for d in documents if d["kind"] == "Service" and d["metadata"]["name"] == "iot-preservarium-workers"
    )
    assert not monitor["spec"]["selector"]["matchLabels"].items() <= headless["metadata"]["labels"].items(), (
        "scraped twice"
    )
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "preservarium"  # the rules' job


def test_a_release_step_comes_before_the_workers_and_can_read_its_settings(helm: str) -> None:
    documents = made(helm, EVERYTHING)
    hooks = {
        d["kind"]: d["metadata"]["annotations"]
        for d in documents
        if "helm.sh/hook" in d["metadata"].get("annotations", {})
    }
    assert set(hooks) == {"ConfigMap", "ServiceAccount", "Job"}
    assert int(hooks["ConfigMap"]["helm.sh/hook-weight"]) < int(hooks["Job"]["helm.sh/hook-weight"])
