//! What is in `deploy` is what Kubernetes and Compose take, and fits the server: a field that neither knows is an error, and the paths
//! and ports that are asked for are answered.
//!
//! The types are the part of both schemas that the files use, by the names of the Kubernetes API 1.33 and of the Compose specification.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::support::Service as Flora;

type Labels = BTreeMap<String, String>;

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all_fields = "camelCase", deny_unknown_fields)]
enum Manifest {
    Service { api_version: String, metadata: Metadata, spec: ServiceSpec },
    Deployment { api_version: String, metadata: Metadata, spec: DeploymentSpec },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: Option<String>,
    #[serde(default)]
    labels: Labels,
    #[serde(default)]
    annotations: Labels,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceSpec {
    selector: Labels,
    ports: Vec<ServicePort>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServicePort {
    name: String,
    port: u16,
    target_port: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeploymentSpec {
    replicas: u32,
    selector: Selector,
    template: Template,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    match_labels: Labels,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Template {
    metadata: Metadata,
    spec: PodSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodSpec {
    termination_grace_period_seconds: u64,
    security_context: PodSecurity,
    containers: Vec<Container>,
    volumes: Vec<Volume>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodSecurity {
    run_as_non_root: bool,
    run_as_user: u32,
    seccomp_profile: Seccomp,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
enum Seccomp {
    RuntimeDefault,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Container {
    name: String,
    image: String,
    args: Vec<String>,
    env: Vec<Variable>,
    ports: Vec<ContainerPort>,
    liveness_probe: Probe,
    readiness_probe: Probe,
    startup_probe: Probe,
    resources: Resources,
    security_context: ContainerSecurity,
    volume_mounts: Vec<Mount>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Variable {
    name: String,
    value_from: VariableSource,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct VariableSource {
    secret_key_ref: SecretKey,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretKey {
    name: String,
    key: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ContainerPort {
    name: String,
    container_port: u16,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Probe {
    http_get: HttpGet,
    period_seconds: u32,
    failure_threshold: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpGet {
    path: String,
    port: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resources {
    requests: Amounts,
    limits: Amounts,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Amounts {
    cpu: Option<String>,
    memory: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ContainerSecurity {
    allow_privilege_escalation: bool,
    read_only_root_filesystem: bool,
    capabilities: Capabilities,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    drop: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Mount {
    name: String,
    mount_path: String,
    read_only: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Volume {
    name: String,
    persistent_volume_claim: Claim,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Claim {
    claim_name: String,
    read_only: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Compose {
    services: BTreeMap<String, ComposeService>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ComposeService {
    image: String,
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    ports: Vec<String>,
    volumes: Vec<String>,
    read_only: bool,
    cap_drop: Vec<String>,
    security_opt: Vec<String>,
    stop_grace_period: String,
}

const KUBERNETES: &str = include_str!("../../../deploy/kubernetes.yaml");
const COMPOSE: &str = include_str!("../../../deploy/compose.yaml");

/// The documents of a file; an error tells what in it isn't known.
fn documents<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, String> {
    serde_saphyr::from_multiple(text).map_err(|error| error.to_string())
}

/// Where arguments say that a folder is, and how long running requests have.
fn said<'a>(arguments: &'a [String], option: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == option)?;
    arguments.get(at + 1).map(String::as_str)
}

#[tokio::test]
async fn the_manifest_is_kubernetes_and_fits_the_server() {
    let manifests: Vec<Manifest> = documents(KUBERNETES).unwrap();
    let [
        Manifest::Service { api_version: core, metadata, spec: service },
        Manifest::Deployment { api_version: apps, metadata: deployment, spec },
    ] = &manifests[..]
    else {
        panic!("{manifests:?}")
    };
    assert_eq!((&core[..], &apps[..]), ("v1", "apps/v1"));
    assert_eq!((metadata.name.as_deref(), deployment.name.as_deref()), (Some("flora"), Some("flora")));
    // The service finds the pods, and the deployment its own.
    let Template { metadata, spec: pod } = &spec.template;
    assert!(spec.replicas > 0 && !metadata.labels.is_empty());
    assert_eq!((&service.selector, &spec.selector.match_labels), (&metadata.labels, &metadata.labels));
    let [container] = &pod.containers[..] else { panic!("{pod:?}") };
    let [port] = &container.ports[..] else { panic!("{container:?}") };
    let [outer] = &service.ports[..] else { panic!("{service:?}") };
    assert_eq!(
        (&outer.target_port, &outer.name, outer.port, port.container_port),
        (&port.name, &port.name, 8000, 8000)
    );
    let flora = Flora::new();
    for probe in [&container.liveness_probe, &container.readiness_probe, &container.startup_probe] {
        assert_eq!(probe.http_get.port, port.name);
        assert_eq!(flora.get(&probe.http_get.path).await.status, 200, "{probe:?}");
        assert!(probe.period_seconds > 0 && probe.failure_threshold > 0);
    }
    let annotation = |name: &str| &metadata.annotations[&format!("prometheus.io/{name}")];
    assert_eq!((&annotation("scrape")[..], &annotation("port")[..]), ("true", "8000"));
    let metrics = flora.get(annotation("path")).await.text;
    for name in KUBERNETES.split(|character: char| character.is_whitespace() || character == ',') {
        assert!(!name.starts_with("vllm:") || metrics.contains(name), "{name}");
    }
    // Running requests end before the pod is killed.
    let grace: u64 = said(&container.args, "--grace").unwrap().parse().unwrap();
    assert!(grace < pod.termination_grace_period_seconds);
    for (option, name) in [("--model", "model"), ("--adapters", "adapters")] {
        let mount = container.volume_mounts.iter().find(|mount| mount.name == name).unwrap();
        assert_eq!((said(&container.args, option), mount.read_only), (Some(&mount.mount_path[..]), true));
        let volume = pod.volumes.iter().find(|volume| volume.name == name).unwrap();
        assert!(volume.persistent_volume_claim.read_only && !volume.persistent_volume_claim.claim_name.is_empty());
    }
    let variables: Vec<&str> = container.env.iter().map(|variable| &variable.name[..]).collect();
    assert_eq!(variables, ["FLORA_API_KEY"]);
    let key = &container.env[0].value_from.secret_key_ref;
    assert!(!key.name.is_empty() && !key.key.is_empty() && !container.image.is_empty() && !container.name.is_empty());
    let security = &container.security_context;
    assert!(!security.allow_privilege_escalation && security.read_only_root_filesystem);
    assert_eq!(security.capabilities.drop, ["ALL"]);
    assert!(pod.security_context.run_as_non_root && pod.security_context.run_as_user > 0);
    assert!(matches!(pod.security_context.seccomp_profile, Seccomp::RuntimeDefault));
    let Resources { requests, limits } = &container.resources;
    assert!(requests.cpu.is_some() && requests.memory.ends_with("Gi") && limits.memory.ends_with("Gi"));
}

#[test]
fn the_compose_file_is_composes() {
    let files: Vec<Compose> = documents(COMPOSE).unwrap();
    let [Compose { services }] = &files[..] else { panic!("{files:?}") };
    let service = &services["flora"];
    let targets: Vec<&str> = service.volumes.iter().filter_map(|volume| volume.split(':').nth(1)).collect();
    assert_eq!(targets, [said(&service.command, "--model").unwrap(), said(&service.command, "--adapters").unwrap()]);
    assert!(service.volumes.iter().all(|volume| volume.ends_with(":ro")) && service.read_only);
    assert!(
        service.environment["FLORA_API_KEY"].starts_with("${FLORA_API_KEY:?"),
        "a server that others reach has a key"
    );
    assert_eq!(service.ports, ["127.0.0.1:8000:8000"]);
    assert_eq!((&service.cap_drop[..], &service.image[..]), (&["ALL".to_owned()][..], "flora:latest"));
    assert_eq!((&service.security_opt[0][..], &service.stop_grace_period[..]), ("no-new-privileges:true", "45s"));
}

#[test]
fn a_field_that_nobody_knows_is_found() {
    for (from, to, field) in [
        ("replicas:", "replica:", "replica"),
        ("containerPort", "containerport", "containerport"),
        ("runAsNonRoot: true", "runAsNonRoot: true\n        runAsRoot: false", "runAsRoot"),
        ("periodSeconds: 10", "periodSeconds: ten", "ten"),
    ] {
        let changed = KUBERNETES.replacen(from, to, 1);
        assert!(changed != KUBERNETES, "{from}");
        let error = documents::<Manifest>(&changed).unwrap_err();
        assert!(error.contains(field) || field == "ten", "{field}: {error}");
    }
    assert!(documents::<Compose>(&COMPOSE.replacen("cap_drop", "cap-drop", 1)).is_err());
}
