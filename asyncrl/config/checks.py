"""What a configuration must satisfy: each key by itself, and keys together. Standard library only.

Every rule over keys returns a sentence with the values, the rule and the remedy, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from asyncrl.config import Config
from asyncrl.config.keys import Key, keys, shown, value_of
from asyncrl.config.method_checks import METHOD_RULES
from asyncrl.config.method_sections import MIN_TEMPERATURE
from asyncrl.errors import BindError, ConfigError
from asyncrl.host.addresses import (
    AUTO,
    OFF,
    http_address,
    ip_address,
    is_loopback,
    is_wildcard,
    rollout_addresses,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

TOKEN_BYTES = 8  # one int32 token id and one float32 log-prob
SPAN_BYTES = 24  # int64 start, stop, version
ROLLOUT_OVERHEAD_BYTES = 1024  # keys, reward, reward parts
GROUP_OVERHEAD_BYTES = 4096  # header, lease key, task payload


def check_values(config: Config, origins: dict[str, str] | None = None) -> list[str]:
    """Problems of single values, each as one sentence. `origins` says where a key was set."""
    problems = []
    for key in keys():
        value = value_of(config, key.name)
        elements = value if isinstance(value, list) else [value]
        broken = next((rule for element in elements if (rule := _broken_rule(key, element))), None)
        if broken:
            problems.append(key.refusal(key.name, shown(value), (origins or {}).get(key.name, ""), broken))
    return problems


def _broken_rule(key: Key, value: Any) -> str | None:
    bounds = key.bounds
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    broken = (
        (bounds.choices and value not in bounds.choices)
        or (bounds.minimum is not None and value < bounds.minimum)
        or (bounds.above is not None and value <= bounds.above)
        or (bounds.maximum is not None and value > bounds.maximum)
    )
    return key.rule if broken else None


# -- keys together -------------------------------------------------------------------------------------------


def largest_group_bytes(config: Config) -> int:
    """Upper bound of one GroupResult frame, in bytes: prompt + rollouts x (tokens, log-probs, spans, reward parts).

    A completion crosses at most one version boundary per step of its allowed age, so it has at most max_age + 2 spans.
    """
    sampling = config.sampling
    rollout = sampling.max_new_tokens * TOKEN_BYTES
    rollout += (config.staleness.max_age + 2) * SPAN_BYTES + ROLLOUT_OVERHEAD_BYTES
    return GROUP_OVERHEAD_BYTES + 4 * config.model.max_length + max(sampling.group_size, config.eval.samples) * rollout


def _names_fit(config: Config) -> str | None:
    allowed = "letters, digits, '.', '_' and '-'"
    if not _NAME.fullmatch(config.run.name):
        return f"run.name={config.run.name!r} must be {allowed}: it names folders and logs"
    if config.generator.id and not _NAME.fullmatch(config.generator.id):
        return f"generator.id={config.generator.id!r} must be {allowed}, or empty"
    if not config.run.dir:
        return "run.dir is empty: give the folder for everything the run writes, for example runs/${run.name}"
    return None


def _model_is_given(config: Config) -> str | None:
    if config.model.path:
        return None
    return "model.path is empty: give the folder of the initial model (model.path=FOLDER); bin/warmup makes tiny ones"


def _task_is_an_import_path(config: Config) -> str | None:
    if _IMPORT_PATH.fullmatch(config.task.path):
        return None
    return f"task.path={config.task.path!r} must be `module:Class`, for example asyncrl.tasks.gsm8k:Gsm8k"


def _completion_leaves_room_for_a_prompt(config: Config) -> str | None:
    new, longest = config.sampling.max_new_tokens, config.model.max_length
    if new < longest:
        return None
    return (
        f"sampling.max_new_tokens={new} leaves no room for a prompt in model.max_length={longest}; "
        f"lower the first or raise the second"
    )


def _engine_holds_one_group(config: Config) -> str | None:
    sizes = {"sampling.group_size": config.sampling.group_size, "eval.samples": config.eval.samples}
    name, size = max(sizes.items(), key=lambda item: item[1])
    room = config.generator.max_sequences
    if room >= size:
        return None
    return (
        f"generator.max_sequences={room} is less than {name}={size}: a lease is one whole group; "
        f"set generator.max_sequences to a multiple of {size}"
    )


def _evaluation_can_differ(config: Config) -> str | None:
    samples, temperature = config.eval.samples, config.eval.temperature
    if samples > 1 and temperature == 0.0:
        return f"eval.samples={samples} greedy completions of a prompt are all equal: set eval.temperature above 0"
    if 0.0 < temperature < MIN_TEMPERATURE:
        return (
            f"eval.temperature={temperature:g} is below {MIN_TEMPERATURE:g}, at which vLLM would sample instead; "
            "set that, or 0 for greedy completions"
        )
    return None


def _sequence_fits_micro_batch(config: Config) -> str | None:
    budget, longest = config.learner.micro_batch_tokens, config.model.max_length
    if budget >= longest:
        return None
    return (
        f"learner.micro_batch_tokens={budget} cannot hold one sequence of model.max_length={longest} tokens; "
        f"set learner.micro_batch_tokens to {longest} or more"
    )


def _betas_are_a_pair(config: Config) -> str | None:
    betas = config.learner.betas
    if len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas):
        return None
    return f"learner.betas={betas} must be two numbers from 0 up to, not including, 1, for example [0.9, 0.95]"


def _cpus_fit_threads(config: Config) -> str | None:
    for section, pinned in (("learner", config.learner), ("generator", config.generator)):
        cpus = pinned.cpus
        if len(set(cpus)) != len(cpus) or any(cpu < 0 for cpu in cpus):
            return f"{section}.cpus={cpus} must be different CPU numbers from 0, for example [0]"
        if cpus and pinned.threads > len(cpus):
            return (
                f"{section}.threads={pinned.threads} on {section}.cpus={cpus}: threads that share a core spin against "
                f"each other; give {pinned.threads} CPUs or set {section}.threads={len(cpus)}"
            )
    return None


def _nodes_can_meet(config: Config) -> str | None:
    learner = config.learner
    if learner.nodes == 1:
        return None
    if not learner.port:
        return (
            f"learner.nodes={learner.nodes} with learner.port=0: ranks of other hosts cannot know the port at which "
            "they meet; set learner.port, for example to 29500"
        )
    if is_loopback(config.weights.host):
        return (
            f"learner.nodes={learner.nodes} but weights.host={config.weights.host} is loopback, where other hosts "
            "cannot meet; set weights.host to the learner's private address"
        )
    return None


def _sequences_can_be_shared(config: Config) -> str | None:
    learner = config.learner
    shared, count = learner.sequence_parallel, learner.ranks * learner.nodes
    if count % shared == 0:
        return None
    return (
        f"learner.sequence_parallel={shared} does not divide the {count} trainer processes of "
        f"learner.ranks={learner.ranks} x learner.nodes={learner.nodes}: each shares with as many others; "
        f"set learner.ranks to a multiple of {shared}, or learner.sequence_parallel to a divisor of {count}"
    )


def _replicas_fit(config: Config) -> str | None:
    learner = config.learner
    copies, count = learner.replicas, learner.ranks * learner.nodes
    given = f"learner.replicas={copies}"
    if count % copies:
        return (
            f"{given} does not divide the {count} trainer processes of learner.ranks={learner.ranks} x "
            f"learner.nodes={learner.nodes}: each copy of the model takes as many; set learner.ranks to a multiple of "
            f"{copies}, or learner.replicas to a divisor of {count}"
        )
    if copies % learner.nodes and learner.nodes % copies:
        return (
            f"{given} with learner.nodes={learner.nodes} and learner.ranks={learner.ranks}: a copy of the model would "
            "take a part of one host and a part of another; set learner.replicas to a multiple or a divisor of "
            "learner.nodes"
        )
    return None


def _engine_can_do_it(config: Config) -> str | None:
    learner = config.learner
    count = learner.ranks * learner.nodes
    if count > 1 and learner.engine == "single":
        return (
            f"learner.engine=single is one process, but learner.ranks={learner.ranks} x learner.nodes={learner.nodes} "
            f"are {count}; set learner.engine=auto or fsdp"
        )
    if count > 1 and config.update.what == "lora" and config.update.lora_sync == "merged":
        return (
            f"update.lora_sync=merged with {count} trainer processes: none of them holds a whole weight to merge into; "
            "set update.lora_sync=adapter"
        )
    only_fsdp = {
        f"learner.activation_checkpointing={learner.activation_checkpointing}": learner.activation_checkpointing
        != "none",
        "learner.offload_optimizer=true": learner.offload_optimizer,
    }
    asked = [text for text, is_asked in only_fsdp.items() if is_asked]
    single = learner.engine == "single" or (learner.engine == "auto" and count == 1 and learner.device == "cpu")
    if single and asked:
        return (
            f"{asked[0]} needs learner.engine=fsdp, here it is {learner.engine} (one process); set learner.engine=fsdp"
        )
    return None


def _reward_ends_before_its_lease(config: Config) -> str | None:
    reward, lease = config.generator.reward_timeout_s, config.generator.lease_timeout_s
    if reward < lease:
        return None
    return (
        f"generator.reward_timeout_s={reward} is not below generator.lease_timeout_s={lease}: a slow reward would cost "
        f"the whole lease; lower the first or raise the second"
    )


def _largest_group_fits(config: Config) -> str | None:
    size = largest_group_bytes(config)
    limits = {
        "transport.max_frame_bytes": config.transport.max_frame_bytes,
        "transport.credit_bytes": config.transport.credit_bytes,
        "generator.outbox_bytes": config.generator.outbox_bytes,
    }
    name, limit = min(limits.items(), key=lambda item: item[1])
    if size <= limit:
        return None
    return (
        f"{name}={limit} is smaller than the largest possible group, {size} bytes "
        f"(sampling.group_size={config.sampling.group_size} x sampling.max_new_tokens={config.sampling.max_new_tokens} "
        f"x {TOKEN_BYTES} bytes, plus prompt and spans); raise {name} or lower one of the two"
    )


def _address_is_named(config: Config) -> str | None:
    try:
        rollout_addresses(config.transport.address, config.run.dir)
    except (ConfigError, BindError) as error:
        return str(error)
    return None


def _pages_have_an_address(config: Config) -> str | None:
    given = {
        f"{role}.http": section.http for role, section in (("learner", config.learner), ("generator", config.generator))
    }
    fixed = {key: address for key, address in given.items() if address not in (AUTO, OFF)}
    try:
        places = [http_address(address, key) for key, address in fixed.items()]
    except ConfigError as error:
        return str(error)
    if len(places) == 2 and places[0] == places[1]:
        return f"{' and '.join(f'{key}={address}' for key, address in fixed.items())} are one place; give each its own"
    return None


def _weight_host_is_private(config: Config) -> str | None:
    host = config.weights.host
    address = ip_address(host)
    if not host or is_wildcard(host):
        return f"weights.host={host!r} must be one private address of the learner, for example 127.0.0.1 or 10.0.0.1"
    if address is not None and address.is_global:
        return (
            f"weights.host={host} is a public address, and the weight plane has no authentication; "
            f"use an address of a private network between the hosts"
        )
    if is_loopback(host) and not on_loopback(config):
        return (
            f"weights.host={host} is loopback but transport.address={config.transport.address} is not: generators on "
            f"other hosts could not fetch weights; set weights.host to the learner's private address"
        )
    return None


def on_loopback(config: Config) -> bool:
    """Whether the rollout link stays on this machine; true for an address that another rule refuses."""
    try:
        return all(address.is_loopback for address in rollout_addresses(config.transport.address, config.run.dir))
    except (ConfigError, BindError):
        return True


KEY_PAIRS = {
    "learner": ("transport.server_key_file", "transport.allowed_keys_file"),
    "generator": ("transport.server_public_key_file", "transport.client_key_file"),
}


def _curve_keys_come_in_pairs(config: Config) -> str | None:
    for role, pair in KEY_PAIRS.items():
        given = [name for name in pair if value_of(config, name)]
        if len(given) == 1:
            missing = next(name for name in pair if name not in given)
            return f"{given[0]} is set but {missing} is empty: the {role} needs both for CURVE; set {missing}"
    return None


def _open_addresses_are_authenticated(config: Config) -> str | None:
    if on_loopback(config) or any(value_of(config, pair[0]) for pair in KEY_PAIRS.values()):
        return None
    return (
        f"transport.address={config.transport.address} is not loopback, so CURVE keys are required: the learner sets "
        f"{' and '.join(KEY_PAIRS['learner'])}, each generator {' and '.join(KEY_PAIRS['generator'])}"
    )


def _nccl_has_gpus(config: Config) -> str | None:
    on_cpu = [name for name in ("learner.device", "generator.device") if value_of(config, name) == "cpu"]
    if config.weights.backend != "nccl" or not on_cpu:
        return None
    return f"weights.backend=nccl moves weights between GPUs, but {on_cpu[0]}=cpu; set weights.backend=gloo or auto"


def _ipc_shares_a_device(config: Config) -> str | None:
    devices = {name: value_of(config, name) for name in ("learner.device", "generator.device")}
    if config.weights.backend != "ipc" or set(devices.values()) != {"cpu", "cuda"}:
        return None
    differing = " and ".join(f"{name}={device}" for name, device in devices.items())
    return f"weights.backend=ipc shares memory of one device, but {differing}; give both one device, or use gloo"


RULES: tuple[Callable[[Config], str | None], ...] = (
    _names_fit,
    _model_is_given,
    _task_is_an_import_path,
    _completion_leaves_room_for_a_prompt,
    _engine_holds_one_group,
    _evaluation_can_differ,
    _sequence_fits_micro_batch,
    _betas_are_a_pair,
    _cpus_fit_threads,
    _nodes_can_meet,
    _sequences_can_be_shared,
    _replicas_fit,
    _engine_can_do_it,
    _reward_ends_before_its_lease,
    _largest_group_fits,
    _address_is_named,
    _pages_have_an_address,
    _weight_host_is_private,
    _curve_keys_come_in_pairs,
    _open_addresses_are_authenticated,
    _nccl_has_gpus,
    _ipc_shares_a_device,
    *METHOD_RULES,
)


def check(config: Config) -> None:
    """Checks keys against each other.

    Raises ConfigError naming every broken rule, one per line.
    """
    raise_all([problem for rule in RULES if (problem := rule(config))])


def raise_all(problems: list[str]) -> None:
    """Raises ConfigError with all `problems`, or returns when there are none."""
    if problems:
        raise ConfigError("\n".join(problems))
