"""The manifests, by the schemas of the API, and by what the relay is."""

from typing import Any, Final

import kubernetes_validate
import pytest
import yaml

from relay.config.options import OPTIONS
from tests.process import CHECKOUT

FOLDER: Final = CHECKOUT / "contrib/kubernetes"
# Of the API itself; the others are of what is installed into it.
MANIFESTS: Final = ("namespace.yaml", "configmap.yaml", "secret.yaml", "daemonset.yaml")
VERSIONS: Final = ("1.31", "1.34")


def load(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return manifest


@pytest.fixture
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = load("daemonset.yaml")["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_the_api_takes(name: str, version: str) -> None:
    kubernetes_validate.validate(load(name), version, strict=True)


def test_what_is_wrong_is_found() -> None:
    wrong = load("daemonset.yaml")
    wrong["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_kustomization_names_what_there_is() -> None:
    kustomization = load("kustomization.yaml")
    # A secret that everybody can read here would be none.
    assert set(kustomization["resources"]) == {*MANIFESTS} - {"secret.yaml"}
    files = {path.name for path in FOLDER.glob("*.yaml")}
    assert files == {*MANIFESTS, "kustomization.yaml", "podmonitor.yaml"}


def test_it_is_the_least_that_a_container_can_be(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]


def test_it_has_the_time_to_drain(pod: dict[str, Any]) -> None:
    drains_for = int(load("configmap.yaml")["data"]["DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > drains_for


def test_probes_and_prometheus_ask_where_it_listens(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables["HEALTH_CHECK_ADDR"] == f"$(NODE_IP):{ports['http']}"
    for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    [endpoint] = load("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    labels = load("daemonset.yaml")["spec"]["template"]["metadata"]["labels"]
    assert load("podmonitor.yaml")["spec"]["selector"]["matchLabels"] == labels


def test_each_variable_is_an_option(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    names = {each["name"] for each in container["env"]} | set(load("configmap.yaml")["data"])
    assert names - {"NODE_IP"} <= {option.variable for option in OPTIONS}


def test_the_secret_is_where_the_option_says(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    [file] = load("secret.yaml")["stringData"]
    assert variables["AUTH_SECRET_FILE"] == f"{mount['mountPath']}/{file}"
    assert volume["secret"]["secretName"] == load("secret.yaml")["metadata"]["name"]
