"""A run on Kubernetes: manifests for `kubectl apply -f`, with comments on what to change."""

from __future__ import annotations

import json
from pathlib import Path

from asyncrl import __version__
from asyncrl.cli.launch.cluster import HTTP_PORT, ClusterRun, Resources, filled

MANIFESTS = """\
# The run @RUN@ on Kubernetes: a Job for the learner, a StatefulSet of generators that may grow and shrink at any time.
# Printed by asyncrl @VERSION@ from @CONFIG@. Change whatever your cluster wants otherwise.
#
#   asyncrl-keys make keys @IDS@
#   kubectl create secret generic @LABEL@-keys --from-file=keys
#   kubectl apply -f FILE
#   kubectl scale statefulset @LABEL@-generator --replicas=8
#
# Each generator needs a key of its own: `asyncrl-keys add keys @PREFIX_OF_IDS@NUMBER ...` and the secret again
# (kubectl create ... --dry-run=client -o yaml | kubectl apply -f -) before there are more of them than keys. A learner
# that runs takes the new list into account. Pods reach each other at any port: a NetworkPolicy must let them.
# Every pod sees all keys of the secret: divide it where you trust some pods less than others.
# The rollout link is encrypted (CURVE); weights are not. Paths in the configuration are those inside of a pod.
@NOTES@
# --- the configuration, as it was given ---
apiVersion: v1
kind: ConfigMap
metadata:
  name: @LABEL@-config
data:
  run.yaml: |2
@CONFIGURATION@
---
# --- the run folder, shared by all: journal, checkpoints, metrics, and who a generator was before it died ---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: @LABEL@-runs
spec:
  accessModes: [ReadWriteMany]
  resources:
    requests:
      storage: @DISK@Gi
---
# --- names of the pods: the learner is @LABEL@-learner-0.@LABEL@ ---
apiVersion: v1
kind: Service
metadata:
  name: @LABEL@
spec:
  clusterIP: None
  publishNotReadyAddresses: true # the learner listens long before it trains
  selector:
    asyncrl-run: @LABEL@
  ports:
    - {name: rollouts, port: @PORT@}
    - {name: http, port: @HTTP_PORT@}
---
# --- the learner: @NODES_TEXT@ ---
apiVersion: batch/v1
kind: Job
metadata:
  name: @LABEL@-learner
spec:
  completionMode: Indexed # gives each pod a lasting name
  completions: @NODES@
  parallelism: @NODES@
  backoffLimit: 100 # each life goes on from the checkpoint and the journal
  template:
    metadata:
      labels: {asyncrl-run: @LABEL@, asyncrl-role: learner}
      annotations: {prometheus.io/scrape: "true", prometheus.io/port: "@HTTP_PORT@"}
    spec:
      subdomain: @LABEL@
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 60 # for the last checkpoint
      containers:
        - name: learner
          image: @IMAGE@
          # Where the run folder is and where your task can be imported from.
          workingDir: /runs
          command: [sh, -c]
          args:
            - |
@LEARNER_COMMAND@
          env:
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
          ports:
            - {name: rollouts, containerPort: @PORT@}
            - {name: http, containerPort: @HTTP_PORT@}
@LEARNER_PROBES@
          resources:
@LEARNER_RESOURCES@
          volumeMounts:
@MOUNTS@
      volumes:
@VOLUMES@
---
# --- generators: a StatefulSet, because one that comes back under its name goes on as itself ---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: @LABEL@-generator
spec:
  serviceName: @LABEL@
  replicas: @GENERATORS@
  podManagementPolicy: Parallel # nobody waits for anybody
  selector:
    matchLabels: {asyncrl-run: @LABEL@, asyncrl-role: generator}
  template:
    metadata:
      labels: {asyncrl-run: @LABEL@, asyncrl-role: generator}
      annotations: {prometheus.io/scrape: "true", prometheus.io/port: "@HTTP_PORT@"}
    spec:
      terminationGracePeriodSeconds: 30
      containers:
        - name: generator
          image: @IMAGE@
          workingDir: /runs
          command: [sh, -c]
          args:
            - |
@GENERATOR_COMMAND@
          env:
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
          ports:
            - {name: http, containerPort: @HTTP_PORT@}
@GENERATOR_PROBES@
          resources:
@GENERATOR_RESOURCES@
          volumeMounts:
@MOUNTS@
      volumes:
@VOLUMES@
"""

MOUNTS = """\
- {name: config, mountPath: /config, readOnly: true}
- {name: keys, mountPath: /keys, readOnly: true}
- {name: models, mountPath: /models, readOnly: true}
- {name: runs, mountPath: /runs}
- {name: shm, mountPath: /dev/shm}"""

VOLUMES = """\
- {name: config, configMap: {name: @LABEL@-config}}
- {name: keys, secret: {secretName: @LABEL@-keys, defaultMode: 256}} # 0400
# A claim of yours with the model's folder at @MODEL@.
- {name: models, persistentVolumeClaim: {claimName: models, readOnly: true}}
- {name: runs, persistentVolumeClaim: {claimName: @LABEL@-runs}}
# Processes of one pod hand each other tensors here; it counts as memory.
- {name: shm, emptyDir: {medium: Memory, sizeLimit: 16Gi}}"""

LEARNER_COMMAND = """\
set -- @OVERRIDES@ run.dir=@RUN_DIR@ model.path=@MODEL@ @LEARNER_PORT@\\
  transport.server_key_file=/keys/learner.key transport.allowed_keys_file=/keys/allowed_keys"""

ALONE = """\
exec asyncrl-learner /config/run.yaml "$@" "learner.http=$POD_IP:@HTTP_PORT@" \\
  "transport.address=tcp://$POD_IP:@PORT@" "weights.host=$POD_IP\""""

OF_SEVERAL = """\
if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
  exec asyncrl-learner /config/run.yaml "$@" "learner.http=$POD_IP:@HTTP_PORT@" \\
    "transport.address=tcp://$POD_IP:@PORT@" "weights.host=$POD_IP"
fi
exec asyncrl-trainer-node /config/run.yaml "$@" --node "$JOB_COMPLETION_INDEX" \\
  "transport.address=tcp://$POD_IP:@PORT@" "weights.host=@LEARNER@\""""

GENERATOR_COMMAND = """\
exec asyncrl-generator /config/run.yaml @OVERRIDES@ run.dir=@RUN_DIR@ model.path=@MODEL@ @LEARNER_PORT@\\
  "generator.id=$POD_NAME" "generator.http=$POD_IP:@HTTP_PORT@" \\
  "transport.address=tcp://@LEARNER@:@PORT@" weights.host=@LEARNER@ \\
  "transport.client_key_file=/keys/$POD_NAME.key" transport.server_public_key_file=/keys/learner.pub"""

# The daemon's own word that its event loop turns; starting takes minutes where images and models are large.
PROBES = """\
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  failureThreshold: 90
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 15
  timeoutSeconds: 5
  failureThreshold: 4"""


def kubernetes_manifests(run: ClusterRun, image: str) -> str:
    """The file for `kubectl apply -f`."""
    config = run.config
    nodes = config.learner.nodes
    words = {
        "RUN": config.run.name,
        "VERSION": __version__,
        "CONFIG": Path(run.config_file).name,
        "LABEL": run.label,
        "IDS": " ".join(f"{run.generator_prefix}{number}" for number in range(run.generators)),
        "PREFIX_OF_IDS": run.generator_prefix,
        "NOTES": "".join(f"# Note: {note}.\n" for note in run.notes),
        "CONFIGURATION": _indented(Path(run.config_file).read_text(encoding="utf-8"), 4),
        "DISK": str(run.disk_gib),
        "NODES": str(nodes),
        "NODES_TEXT": "one pod" if nodes == 1 else f"{nodes} pods, the first of which is the learner's own",
        "GENERATORS": str(run.generators),
        "IMAGE": json.dumps(image),
        "PORT": str(run.rollout_port),
        "HTTP_PORT": str(HTTP_PORT),
        "LEARNER_PORT": f"learner.port={config.learner.port} " if nodes > 1 else "",
        "LEARNER": f"{run.label}-learner-0.{run.label}",
        "MODEL": f"/models/{Path(config.model.path).name}",
        "RUN_DIR": f"/runs/{run.label}",
        "OVERRIDES": " ".join(map(_quoted, run.overrides)),
        "LEARNER_RESOURCES": _indented(_resources(run.learner), 12),
        "GENERATOR_RESOURCES": _indented(_resources(run.generator), 12),
        "GENERATOR_PROBES": _indented(PROBES, 10),
        # Ranks of other nodes have no pages of their own, and a probe is the same for all pods.
        "LEARNER_PROBES": _indented(PROBES, 10)
        if nodes == 1
        else "          # no probes: only the first pod has /healthz",
    }
    learner = f"{LEARNER_COMMAND}\n{ALONE if nodes == 1 else OF_SEVERAL}"
    commands = {
        "MOUNTS": _indented(MOUNTS, 12),
        "VOLUMES": _indented(filled(VOLUMES, words), 8),
        "LEARNER_COMMAND": _indented(filled(learner, words), 14),
        "GENERATOR_COMMAND": _indented(filled(GENERATOR_COMMAND, words), 14),
    }
    return filled(MANIFESTS, {**words, **commands})


def _resources(needed: Resources) -> str:
    amounts = [f'cpu: "{needed.cores}"', f"memory: {needed.memory_gib}Gi"]
    limits = [f"memory: {needed.memory_gib}Gi"]
    if needed.gpus:
        amounts.append(f'nvidia.com/gpu: "{needed.gpus}"')
        limits.append(f'nvidia.com/gpu: "{needed.gpus}"')
    return f"requests: {{{', '.join(amounts)}}}\nlimits: {{{', '.join(limits)}}}"


def _quoted(text: str) -> str:
    quoted = text.replace("'", "'\\''")
    return f"'{quoted}'"


def _indented(text: str, spaces: int) -> str:
    return "\n".join(f"{' ' * spaces}{line}".rstrip() for line in text.splitlines())
