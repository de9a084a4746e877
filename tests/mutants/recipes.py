"""Wrong variants of the recipes: what they write, evaluation, normalisation, schedules, shares of time."""

from tests.mutants import variants

_AGAIN = "tests/runtime/test_numerics.py -k in_a_row"
_PIECES = "tests/cli/test_recipes.py tests/reward/test_calibration.py"
_SHOWN = "tests/cli/test_end_to_end.py -k 'reports or leaves'"
_WRITTEN = "tests/cli/test_written.py"


MUTANTS = [
    *variants(
        "ppo/train.py",
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
        ("batch: Any = texts.train[iteration]", "batch: Any = texts.train[0]"),
        ("return dataclasses.replace(data, packing=False)\n", "return data\n"),
        (
            "return Batch(batch.tokens, batch.mask)",
            "return Batch(batch.tokens, batch.mask & batch.completion_mask)",
        ),
    ),
    *variants(
        "ppo/config.py",
        _PIECES,
        (
            "actor.optimizer.with_end(learning * per_iteration)",
            "actor.optimizer.with_end(self.iterations * per_iteration)",
        ),
        (
            "critic.optimizer.with_end(self.iterations * per_iteration)",
            "critic.optimizer.with_end(learning * per_iteration)",
        ),
        ("self.ppo_epochs * self.num_minibatches, self.iterations", "self.ppo_epochs, self.iterations"),
    ),
    *variants(
        "ppo/evaluate.py",
        _SHOWN,
        ('{"before": rows, "first": metrics}', '{"before": [], "first": metrics}'),
    ),
    *variants(
        "ppo/train.py",
        _SHOWN,
        ("count = trainer.config.sample_rows", "count = None"),
    ),
    *variants(
        "ppo/train.py",
        _WRITTEN,
        ('    export_model(folder / "critic", engine.critic)\n', ""),
        (
            'export_model(folder / "critic", engine.critic)',
            'export_model(folder / "critic", dataclasses.replace(engine.critic, reward_bias=0.0))',
        ),
        ('export_model(folder / "model_ema", engine.actor_ema)', "pass"),
        (
            'export_model(folder / "model_ema", engine.actor_ema)',
            'export_model(folder / "model_ema", engine.actor)',
        ),
        ('export_model(folder / "model", engine.actor)', 'export_model(folder / "model", engine.actor_ema)'),
        ('| phase.notes["last"])', '| phase.notes["first"])'),
    ),
    *variants(
        "ppo/evaluate.py",
        _WRITTEN,
        ("rows = rows[: prompts.eval_rows]", "rows = rows"),
        (
            "experience = trainer.generate_experience(batch)\n        own",
            "experience = trainer.generate_experience(prompts.eval[0])\n        own",
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
        ("length=int(mask[row].sum())", "length=int(mask[row].size)"),
        ("score=float(scores[row])", "score=float(scores[0])"),
        ("ended=bool(ended[row])", "ended=True"),
        ("decode(tokenizer, tokens[row][:width][prompt_mask[row]])", "decode(tokenizer, tokens[row][:width])"),
        ("decode(tokenizer, tokens[row][width:][mask[row]])", "decode(tokenizer, tokens[row][width:])"),
        ("float(np.mean(given)) if given", "float(np.sum(given)) if given"),
        ("        phase.logger.log_samples(rows)\n", ""),
    ),
    *variants(
        "hub/tokenizer.py",
        _WRITTEN,
        ("skip_special_tokens=skip_special_tokens", "skip_special_tokens=False"),
    ),
    *variants(
        "cli/phases.py",
        _WRITTEN,
        ("path=reward_model(config, workdir))", "path=None)"),
        ("policy=dataclasses.replace(config.model, path=sft_model(config, workdir))", "policy=config.model"),
    ),
    *variants(
        "reward/calibration.py",
        _PIECES,
        ("gap = 0.0 if few else max(0.0, float(", "gap = 0.0 if few else (float("),
        ("_LEAST_RESPONSES = 8", "_LEAST_RESPONSES = 9"),
        ("scores = scores - gap * ~ended", "scores = scores - gap * ended"),
        ("-float(np.mean(scores)) * gain, ", "-float(np.mean(scores)), "),
        ('"missing_eos_bias": gap * gain}', '"missing_eos_bias": gap}'),
        ("gain = 1 / max(float(np.std(scores)), 1e-6)", "gain = 1 / max(float(np.var(scores)), 1e-6)"),
    ),
    *variants(
        "reward/train.py",
        _PIECES,
        ("float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))", "float(np.mean(difference > 0))"),
        ("difference = chosen[:, None] - rejected[None]", "difference = chosen - rejected"),
        ("pair_metrics(chosen[real], rejected[real])", "pair_metrics(chosen, rejected)"),
        ("float(np.mean(chosen > rejected))", "float(np.mean(chosen < rejected))"),
        ('"eval/margin": float(np.mean(chosen - rejected))', '"eval/margin": float(np.mean(rejected - chosen))'),
        ("float(np.std(scores))", "float(np.std(chosen))"),
        ("optimizer=config.optimizer.with_end(steps)", "optimizer=config.optimizer"),
        ("head_learning_rate=config.head_learning_rate,", ""),
        ("RewardLoss(config.loss, config.compare)", "RewardLoss(config.loss)"),
        ("SplitModel(model, config.trainable_layers)", "SplitModel(model, None)"),
    ),
    *variants(
        "reward/calibration.py",
        _WRITTEN,
        ("temperature=sampling.temperature,", "temperature=1.0,"),
        ("        temperature=sampling.temperature,\n", ""),
        ("        top_k=sampling.top_k,\n", ""),
        ("        top_p=sampling.top_p,\n", ""),
        ("min_new_tokens=sampling.min_new_tokens,", "min_new_tokens=0,"),
        ("max_new_tokens=sampling.max_new_tokens,", "max_new_tokens=sampling.max_new_tokens + 1,"),
        ("jax.random.fold_in(jax.random.key(seed), step)", "jax.random.key(seed)"),
        ("batch = prompts.train[step]", "batch = prompts.train[0]"),
        ("responses.count // prompts.batch_size))", "responses.count // prompts.batch_size - 1))"),
        ("eos_id=ends,\n        row_ids", "row_ids"),
        ("jnp.any(last, axis=1))", "jnp.all(samples.response_mask, axis=1))"),
        ('leaf * gain, params["scalar_head"]', 'leaf, params["scalar_head"]'),
        ('{"reward_bias": bias, "missing_eos_bias": missing_eos_bias}', '{"reward_bias": bias}'),
        ('{"reward_bias": bias, "missing_eos_bias": missing_eos_bias}', '{"missing_eos_bias": missing_eos_bias}'),
    ),
    *variants(
        "reward/train.py",
        _WRITTEN,
        ("        save(**found)", "        save()"),
        ("config.num_layers, key)", "None, key)"),
    ),
    *variants(
        "sft/train.py",
        _PIECES,
        ("loss=SFTLoss(config.loss_on)", "loss=SFTLoss()"),
        ("SplitModel(model, trainable_layers)", "SplitModel(model, None)"),
        ("optimizer=config.optimizer.with_end(steps)", "optimizer=config.optimizer"),
    ),
    *variants(
        "sft/train.py",
        _WRITTEN,
        (
            'phase.notes.setdefault("eval/loss_before", means["loss"])',
            'phase.notes["eval/loss_before"] = means["loss"]',
        ),
        ('math.exp(min(means["loss"], 700.0))', 'means["loss"]'),
        ("example.prompt if example.has_prompt else _opening(example)", "_opening(example)"),
        ("response = tokens[width:][real]", "response = tokens[:width]"),
        ('export_model(phase.folder / "model", trained())', 'export_model(phase.folder / "model", policy)'),
        ("[: config.sample_rows]", ""),
        ("max_new_tokens = config.sample_tokens", "max_new_tokens = 64"),
        ("row[-(decoder.max_positions - max_new_tokens) :]", "row"),
        ("        eos_id=ends,\n", ""),
    ),
    *variants(
        "runtime/supervised_phase.py",
        _AGAIN,
        ("datasets.batches(phase.step, steps)", "datasets.batches(0, steps)"),
    ),
    *variants(
        "runtime/supervised_phase.py",
        _PIECES,
        ("round(epochs * datasets.steps_per_epoch)) if", "round(datasets.steps_per_epoch)) if"),
    ),
    *variants(
        "optim/config.py",
        _PIECES,
        ("return self if self.total_steps else", "return self if True else"),
        ("total_steps=steps)", "total_steps=steps - 1)"),
    ),
    *variants(
        "optim/microbatches.py",
        _PIECES,
        ("return self.rows // self.num_minibatches // self.microbatch_size", "return 1"),
    ),
    *variants(
        "runtime/supervised_phase.py",
        _WRITTEN,
        ('count = totals.pop("count", 0.0)', 'count = len(training.datasets.eval) + 0 * totals.pop("count", 0.0)'),
        ("totals.get(name, 0.0) + float(value)", "float(value)"),
        ('metrics["tokens"] / (time', 'metrics["count"] / (time'),
    ),
]
