"""Data: what is held out, order, shares, BOS and EOS, masks, cutting, widths, rows of processes."""

from tests.mutants import variants

_SETS, _SPLITS, _BATCHES = "data/datasets.py", "data/splits.py", "data/batches.py"
_TOKENS, _FORMATS, _CONFIG = "data/tokens.py", "data/formats.py", "data/config.py"
_ALL = "tests/data/test_datasets.py tests/data/test_splits.py tests/data/test_formats.py"


MUTANTS = [
    *variants(
        _SETS,
        _ALL,
        ("seed + index)", "seed)"),
        (".seed(seed).shuffle()", ".seed(0).shuffle()"),
        (".shuffle().repeat()", ".repeat().shuffle()"),
        ("FIRST_EVAL_ROW + index * batch_size", "FIRST_EVAL_ROW"),
        ("FIRST_EVAL_ROW + index * batch_size", "index * batch_size"),
        ("first_row + mine)", "first_row + np.arange(len(mine)))"),
        ("np.random.default_rng(self.seed).permutation(len(examples))", "range(len(examples))"),
        ('longest *= 2 if phase == "reward" else 1', "longest *= 1"),
        ("weight / sum(weights) for", "1 / len(weights) for"),
        ("list(config.weights) or [", "[1] * len(train) or ["),
        ('held_out[0] if phase == "ppo"', 'None if phase == "sft"'),
        (
            "return Datasets(batches, evals, rows, len(held_out)",
            "return Datasets(batches, evals, rows, len(filled) * batch_size",
        ),
        ("self.train_rows // self.batch_size)", "-(-self.train_rows // self.batch_size))"),
        ("-(-longest // 4), -(-longest // 2)", "-(-longest // 2)"),
        ("if 0 < bucket < longest} | {longest}", "if 0 < bucket < longest} or {longest}"),
        ("[examples[row] for row in mine]", "list(examples)[: len(mine)]"),
        ("np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)", "np.arange(share)"),
        ("return examples[: self.eval_rows]", "return examples"),
        ("(example.prompt.tobytes(),) if example.has_prompt else _tokens_of(example)", "_tokens_of(example)"),
        ("tuple(part.tobytes() for part in (example.prompt, *example.completions))", "(example.prompt.tobytes(),)"),
        (
            "known = set(itertools.chain(*(s.prompts if is_reader(s.path) else s.groups for s in given)))",
            "known = set()",
        ),
        ("group not in known and prompt not in known", "group not in known"),
        ("for path in config.eval_paths or readers]", "for path in config.eval_paths]"),
        ('self._rows(path, "eval", config.eval_split)', 'self._rows(path, "train", config.eval_split)'),
        ("train = [self._without(source, groups, given) for source in sources]", "train = sources"),
        (
            "set() if config.eval_paths else drawn(sources, config.eval_rows, self.seed)",
            "set() if config.eval_paths else drawn(sources, self.eval_rows, self.seed)",
        ),
        ("drawn(sources, config.eval_rows, self.seed)", "drawn(sources, config.eval_rows, 0)"),
        ("end_ids(tokenizer) if eos_ids is None else eos_ids", "end_ids(tokenizer)"),
        (
            "max((example.length for example in examples if example is not None), default=1)",
            "max((len(example.prompt) for example in examples if example is not None), default=1)",
        ),
        ("every = itertools.chain(*train, held_out)", "every = itertools.chain(*train)"),
        ("share(sources, split, self.phase, self.seed)", "share(sources, split, self.phase, 0)"),
        (
            "max((example.length for example in examples if example is not None), default=1)",
            "max((len(example.prompt) for example in examples if example is not None), default=1)",
        ),
    ),
    *variants(
        _SPLITS,
        _ALL,
        ("ONE_IN = 10", "ONE_IN = 5"),
        (
            "rows_left = [min(eval_rows, count.total() // ONE_IN) for count in counts]",
            "rows_left = [eval_rows for count in counts]",
        ),
        ("groups_left = [len(count) // ONE_IN for count in counts]", "groups_left = [len(count) for count in counts]"),
        ("(-counts[group], _draw(group, seed))", "(-counts[group], group)"),
        ("key=lambda group: _draw(group, seed)):", "key=lambda group: _draw(group, 0)):"),
        ('f"{seed}:".encode() + content', "content"),
        ('if kind in ("prompt", "text")', 'if kind == "prompt"'),
        ("missing[phase_of[group]] -= counts[group]", "missing[phase_of[group]] -= 0"),
        ("            missing[index] -= counts[group]\n", "            missing[index] -= 1\n"),
    ),
    *variants(
        _BATCHES,
        _ALL,
        ("FIRST_EVAL_ROW = 1 << 24", "FIRST_EVAL_ROW = 0"),
        (
            "completion[r, begin + len(example.prompt) : end] = True",
            "completion[r, begin + len(example.prompt) : end - 1] = True",
        ),
        (
            "completion[r, begin + len(example.prompt) : end] = True",
            "completion[r, begin + len(example.prompt) - 1 : end] = True",
        ),
        ("= segment, np.arange(end - begin)", "= segment, np.arange(begin, end)"),
        (
            "segments[r, begin:end], positions[r, begin:end] = segment,",
            "segments[r, begin:end], positions[r, begin:end] = 0,",
        ),
        ("margin[r] = example.margin", "margin[r] = 0"),
        (
            "margin[r, : len(row)] = [pair.margin for pair in row]",
            "margin[r, : len(row)] = row[0].margin if row else 0",
        ),
        ("last[..., 0], last[..., 1], real", "last[..., 1], last[..., 0], real"),
        ("example.completions[answer]])", "example.completions[0]])"),
        ("masks = (batch.chosen_mask, batch.rejected_mask) if", "masks = (batch.chosen_mask,) if"),
        ("shared = set.intersection(*", "shared = set.union(*"),
        ("np.asarray(row_ids, np.int32)", "np.arange(len(rows), dtype=np.int32)"),
        ("buckets[bisect.bisect_left(buckets, longest)]", "buckets[bisect.bisect_right(buckets, longest)]"),
        ("key=lambda example: -example.total_length", "key=lambda example: 0"),
        ("place = bisect.bisect_left(spaces, (example.total_length, -1))", "place = len(spaces)"),
        (
            "tokens[r, columns - len(example.prompt) :], mask[r, columns - len(example.prompt) :] =",
            "tokens[r, : len(example.prompt)], mask[r, : len(example.prompt)] =",
        ),
    ),
    *variants(
        _TOKENS,
        _ALL,
        ("prompts[index] if text.templated else bos + prompts[index]", "bos + prompts[index]"),
        ("prompts[index] if text.templated else bos + prompts[index]", "prompts[index]"),
        ("begin = bos if bos and prompt[:1] == bos else []", "begin = []"),
        ("answer[: config.max_tokens - len(prompt)]", "answer[-(config.max_tokens - len(prompt)) :]"),
        ("min(config.max_prompt_tokens, config.max_tokens - 1)", "config.max_tokens - 1"),
        ("prompt[: config.prompt_tokens]\n", "prompt[-config.prompt_tokens :]\n"),
        ("*prompt[len(prompt) - rest :]]", "*prompt[len(begin) :][:rest]]"),
        ("if len(prompt) + min(map(len, answers)) < 2:", "if False:"),
        ("return completion + added", "return completion"),
        ("[tokenizer.eos_token_id] if tokenizer.eos_token_id in eos_ids else list(eos_ids[:1])", "list(eos_ids[:1])"),
        ("for place in range(max(0, len(completion) - 3), len(completion)):", "for place in range(len(completion)):"),
        (
            "len(prompt) + max(map(len, answers)) > config.max_tokens",
            "len(prompt) + len(answers[0]) > config.max_tokens",
        ),
        (
            "len(prompt) + max(map(len, answers)) > config.max_tokens",
            "len(prompt) + max(map(len, answers)) >= config.max_tokens",
        ),
        ("if len(prompt) > config.max_prompt_tokens and not cut:", "if len(prompt) > config.max_tokens and not cut:"),
        ('"has_prompt": bool(text.prompt.strip())', '"has_prompt": True'),
        ('{"margin": text.margin, "columns"', '{"columns"'),
        ("config.pad_token or tokenizer.pad_token", "tokenizer.pad_token or config.pad_token"),
        ("bos + prompt)[:count])", "prompt)[:count])"),
        (
            "max((len(completion) for completion in self.completions), default=0)",
            "sum(len(completion) for completion in self.completions)",
        ),
    ),
    *variants(
        _FORMATS,
        _ALL,
        ('return prompt, (found["chosen"], found["rejected"])', 'return prompt, (found["rejected"], found["chosen"])'),
        (
            'found.get("completion", found.get("chosen") if pair else None)',
            'found.get("completion", found.get("rejected") if pair else None)',
        ),
        ("if name not in names.values()}", "}"),
        (
            "return Texts(prompt, tuple(completions), False, float(margin), others)",
            "return Texts(prompt, tuple(completions), False, abs(float(margin)), others)",
        ),
        (
            'found = found | {"prompt": [{"role": "user", "content"',
            'found = found | {"prompt": [{"role": "assistant", "content"',
        ),
    ),
    *variants(
        _CONFIG,
        _ALL,
        ("tuple(number / sum(numbers) for number in numbers)", "tuple(number / max(numbers) for number in numbers)"),
    ),
]
