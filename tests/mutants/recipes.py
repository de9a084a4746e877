"""The recipes: what is written, evaluation, normalisation, schedules, shares of time."""

from tests.mutants import variants

_AGAIN = "tests/phases/test_faults.py -k in_a_row"
_PIECES = "tests/phases/test_pieces.py tests/phases/test_calibration.py"
_SHOWN = "tests/phases/test_end_to_end.py -k 'reports or leaves'"
_WRITTEN = "tests/phases/test_written.py"


MUTANTS = [
    *variants(
        "phases/ppo.py",
        _PIECES,
        (
            'f"time/{name}_share": seconds / metrics["time/iteration"]',
            'f"time/{name}_share": seconds / sum(parts.values())',
        ),
        (
            'tokens * metrics["time/iteration"] / parts["generate"]',
            'tokens * parts["generate"] / metrics["time/iteration"]',
        ),
        ('metrics["objective/response_length"] * metrics["eps"]', 'metrics["eps"]'),
        ('"reward": "objective/scores"', '"reward": "objective/rlhf_reward"'),
        ("learning * per_iteration),", "settings.iterations * per_iteration),"),
        ("settings.iterations * per_iteration),\n    )", "learning * per_iteration),\n    )"),
        ("settings.ppo_epochs * settings.num_minibatches, settings", "settings.ppo_epochs, settings"),
        ("batch = texts.train[iteration]", "batch = texts.train[0]"),
        ("dataclasses.replace(config.data, packing=False)", "config.data"),
        (
            "PretrainingRows(batch.tokens, batch.mask)",
            "PretrainingRows(batch.tokens, batch.mask & batch.completion_mask)",
        ),
    ),
    *variants(
        "phases/ppo.py",
        _SHOWN,
        ('"before": progress.notes["after"], "first"', '"before": [], "first"'),
        ("count=settings.sample_rows", "count=None"),
    ),
    *variants(
        "phases/ppo.py",
        _WRITTEN,
        ('    save_pretrained(folder / "critic", engine.critic)\n', ""),
        (
            'save_pretrained(folder / "critic", engine.critic)',
            'save_pretrained(folder / "critic", dataclasses.replace(engine.critic, reward_bias=0.0))',
        ),
        ('save_pretrained(folder / "model_ema", engine.actor_ema)', "pass"),
        (
            'save_pretrained(folder / "model_ema", engine.actor_ema)',
            'save_pretrained(folder / "model_ema", engine.actor)',
        ),
        ('save_pretrained(folder / "model", engine.actor)', 'save_pretrained(folder / "model", engine.actor_ema)'),
        ("rows = rows[: prompts.eval_rows]", "rows = rows"),
        (
            "answered = _rows(trainer, trainer.generate_experience(batch), step",
            "answered = _rows(trainer, trainer.generate_experience(prompts.eval[0]), step",
        ),
        ("len(set(words)) / max(len(words), 1)", "len(words) / max(len(set(words)), 1)"),
        ('len({row["response"] for row in rows}) / len(rows)', 'len({row["prompt"] for row in rows}) / len(rows)'),
        (
            "read(experience.logprobs) - read(experience.ref_logprobs)",
            "read(experience.ref_logprobs) - read(experience.logprobs)",
        ),
        (
            "read(experience.logprobs) - read(experience.ref_logprobs), axis=1)",
            "read(experience.logprobs) - read(experience.ref_logprobs), axis=1) / np.maximum(mask.sum(axis=1), 1)",
        ),
        ('"length": int(mask[row].sum())', '"length": int(mask[row].size)'),
        ('"score": float(scores[row])', '"score": float(scores[0])'),
        ("[prompt_mask[row]], skip_special_tokens=True)", "[prompt_mask[row]])"),
        ("decode(tokens[row][width:][mask[row]], skip_special_tokens=True)", "decode(tokens[row][width:][mask[row]])"),
        (
            "decode(tokens[row][width:][mask[row]], skip_special_tokens=True)",
            "decode(tokens[row][width:], skip_special_tokens=True)",
        ),
        ("float(np.mean([row[judge.name] for row in rows]))", "float(np.sum([row[judge.name] for row in rows]))"),
        ('result |= notes["last"]', 'result |= notes["first"]'),
        (
            "record.metrics(step, metrics | failures)\n    record.samples(rows)",
            "record.metrics(step, metrics | failures)",
        ),
        ("path=reward_model(config, workdir))", "path=None)"),
    ),
    *variants(
        "phases/reward.py",
        _PIECES,
        ("gap = 0.0 if few else max(0.0, float(", "gap = 0.0 if few else (float("),
        ("< 8\n", "< 9\n"),
        ("scores = scores - gap * ~ended", "scores = scores - gap * ended"),
        ("-float(np.mean(scores)) * gain, ", "-float(np.mean(scores)), "),
        ('"missing_eos_bias": gap * gain}', '"missing_eos_bias": gap}'),
        ("gain = 1 / max(float(np.std(scores)), 1e-6)", "gain = 1 / max(float(np.var(scores)), 1e-6)"),
        ("float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))", "float(np.mean(difference > 0))"),
        ("difference = chosen[:, None] - rejected[None]", "difference = chosen - rejected"),
        ("chosen, rejected = chosen[real], rejected[real]", "chosen, rejected = chosen, rejected"),
        ("float(np.mean(chosen > rejected))", "float(np.mean(chosen < rejected))"),
        ('"eval/margin": float(np.mean(chosen - rejected))', '"eval/margin": float(np.mean(rejected - chosen))'),
        ("float(np.std(both))", "float(np.std(chosen))"),
        ("optimizer=with_end(settings.optimizer, steps)", "optimizer=settings.optimizer"),
        ("head_learning_rate=settings.head_learning_rate,", ""),
        ("RewardLoss(settings.loss, settings.compare)", "RewardLoss(settings.loss)"),
        ("SplitModel(model, settings.trainable_layers)", "SplitModel(model, None)"),
    ),
    *variants(
        "phases/reward.py",
        _WRITTEN,
        ("temperature=ppo.temperature,", "temperature=1.0,"),
        ("            temperature=ppo.temperature,\n", ""),
        ("            top_k=ppo.top_k,\n", ""),
        ("            top_p=ppo.top_p,\n", ""),
        ("min_new_tokens=ppo.min_new_tokens,", "min_new_tokens=0,"),
        ("max_new_tokens=ppo.max_new_tokens,", "max_new_tokens=ppo.max_new_tokens + 1,"),
        ("jax.random.fold_in(jax.random.key(config.seed), step)", "jax.random.key(config.seed)"),
        ("batch = prompts.train[step]", "batch = prompts.train[0]"),
        ("normalize_rows // prompts.batch_size))", "normalize_rows // prompts.batch_size - 1))"),
        ("eos_id=ends,\n            row_ids", "row_ids"),
        ("jnp.any(last, axis=1)\n", "jnp.all(samples.response_mask, axis=1)\n"),
        ("leaf * gain, whole", "leaf, whole"),
        ('{"reward_bias": bias, "missing_eos_bias": missing_eos_bias}', '{"reward_bias": bias}'),
        ('{"reward_bias": bias, "missing_eos_bias": missing_eos_bias}', '{"missing_eos_bias": missing_eos_bias}'),
        ("            save(**found)", "            save()"),
        ("settings.num_layers, jax.random.key(config.seed))", "None, jax.random.key(config.seed))"),
        ("path=policy_path)", "path=config.model.path)"),
    ),
    *variants(
        "phases/sft.py",
        _PIECES,
        ("loss=SFTLoss(settings.loss_on)", "loss=SFTLoss()"),
        ("SplitModel(model, config.model.trainable_layers)", "SplitModel(model, None)"),
        ("optimizer=with_end(settings.optimizer, steps)", "optimizer=settings.optimizer"),
    ),
    *variants(
        "phases/sft.py",
        _WRITTEN,
        (
            'progress.notes.setdefault("eval/loss_before", held_out["loss"])',
            'progress.notes["eval/loss_before"] = held_out["loss"]',
        ),
        ('math.exp(min(held_out["loss"], 700.0))', 'held_out["loss"]'),
        ("prompt = tokens[mask & ~completion]", "prompt = tokens[mask]"),
        ("response = tokens[width:][real]", "response = tokens[:width]"),
        ('save_pretrained(folder / "model", trained())', 'save_pretrained(folder / "model", pretrained)'),
        ("[: config.sft.sample_rows]", ""),
        ("max_new_tokens=config.sft.sample_tokens", "max_new_tokens=64"),
        ("eos_id=config.ends(pretrained),", ""),
    ),
    *variants(
        "phases/supervised.py",
        _AGAIN,
        ("datasets.batches(progress.step, steps)", "datasets.batches(0, steps)"),
    ),
    *variants(
        "phases/supervised.py",
        _PIECES,
        ("round(epochs * datasets.steps_per_epoch)) if", "round(datasets.steps_per_epoch)) if"),
        ("optimizer if optimizer.total_steps else", "optimizer if True else"),
        ("total_steps=steps)", "total_steps=steps - 1)"),
        ("return batch_size // micro", "return 1"),
    ),
    *variants(
        "phases/supervised.py",
        _WRITTEN,
        ('count = totals.pop("count", 0.0)', 'count = len(datasets.eval) + 0 * totals.pop("count", 0.0)'),
        ("totals.get(name, 0.0) + float(value)", "float(value)"),
        ('numbers["tokens"] / (time', 'numbers["count"] / (time'),
    ),
]
