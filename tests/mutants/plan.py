"""Wrong variants of the plan, the rollout layout and the padded vocabulary."""

from tests.mutants import variants

_COUNTS = "tests/plan/test_counts.py"
_DECODE = "tests/plan/test_decode.py -k h100"
_HOST = "tests/plan/test_host.py"
_LAYOUT = "tests/parallel/test_layout.py"

MUTANTS = [
    *variants(
        "plan/bounds.py",
        _COUNTS,
        ('passes = topology.chip, 2 if one.kind == "all-reduce" else 1', "passes = topology.chip, 1"),
        ("one.group - 1 - far", "one.group - 1"),
        ("math.ceil(one.group / one.local_group) - 1", "0"),
        ("(1, 0) if one.local_group == one.group else (0, 1)", "(1, 0)"),
        ("return chip.start + passes", "return passes"),
    ),
    *variants(
        "plan/collectives.py",
        "tests/plan/test_ahead_of_time.py -k sums",
        ("        return over_tokens\n", "        pass\n"),
    ),
    *variants(
        "plan/flops.py",
        _COUNTS,
        ("return loop_turns(str(equation.source_info.name_stack)) or 1", "return 1"),
    ),
    *variants(
        "plan/abstract.py",
        f"{_DECODE}",
        ("if not config.tie_embeddings:", "if False:"),
        ("sum(jax.tree.leaves(sizes)) * (length - 1)", "sum(jax.tree.leaves(sizes)) * length"),
        ("(end - start) * (width + end - 1)", "(end - start) * (width + end) / 2"),
    ),
    *variants(
        "plan/abstract.py",
        _HOST,
        ("= max(tensors, key", "= min(tensors, key"),
    ),
    *variants(
        "plan/host.py",
        _HOST,
        ("devices = topology.devices_per_machine or devices", "devices = 1"),
        ("checkpoint=devices * state", "checkpoint=state"),
        ('(trained, program.resident["optimizer"])', "(trained, trained)"),
    ),
    *variants(
        "plan/ppo_programs.py",
        _HOST,
        ("**dict.fromkeys(offloaded))", ")"),
        ('if leaf.sharding.memory_kind != "pinned_host"]', 'if leaf.sharding.memory_kind == "pinned_host"]'),
        ("transient, layout, decode, offloaded, rollout)", "transient, layout, decode, rollout=rollout)"),
        ("[dataclasses.replace(one, offloaded=offloaded) for one in exported]", "list(exported)"),
    ),
    *variants(
        "plan/supervised_programs.py",
        _HOST,
        ("phase.params.frozen, sampler.params)", "phase.params.frozen)"),
        ("if settings.normalize_rows:", "if False:"),
    ),
    *variants(
        "plan/shapes.py",
        "tests/plan/test_shapes.py",
        (
            'try_to_load_from_cache(hub_id, "config.json", revision=revision)',
            'try_to_load_from_cache(hub_id, "config.json")',
        ),
        ('.removeprefix("meta-")', ""),
        (r"(-(instruct|chat|it|base", r"(-(instruct|chat|it|base|lora"),
    ),
    *variants(
        "parallel/layout.py",
        _LAYOUT,
        ("if _share_fast_links(layout, n * tensor)", "if True"),
        ("if _share_fast_links(layout, n * tensor)", "if _share_fast_links(layout, n)"),
        ("return device.id // devices_per_machine", "return device.id % devices_per_machine"),
        ('for axis in ("fsdp_to_tensor", "tensor"))', 'for axis in ("tensor",))'),
        (
            "return Layout(mesh, tuple(rules), devices_per_machine=layout.devices_per_machine)",
            "return Layout(mesh, tuple(rules))",
        ),
    ),
    *variants(
        "ppo/initialize.py",
        "tests/ppo/test_engine.py -k padded",
        ("if given is None or given.model.config.table_rows % ", "if True or given.model.config.table_rows % "),
        ("return dataclasses.replace(start, **models, **configs)", "return dataclasses.replace(start, **models)"),
    ),
]
