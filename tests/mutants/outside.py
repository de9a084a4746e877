"""Wrong variants of the code at the edges: reward functions, other programs' checkpoints, the command line."""

from tests.mutants import variants

_CALLS, _EXPORT = "tests/rewards/test_functions.py", "tests/hub/test_export.py"
_HEADS, _LINE = "tests/hub/test_pretrained.py", "tests/cli/test_flags.py"


MUTANTS = [
    *variants(
        "rewards/calling.py",
        _CALLS,
        ("copy.deepcopy(list(values))", "values"),
        ("[list(ids) for ids in inputs.completion_ids or ()] or None", "inputs.completion_ids"),
        (
            'keywords = columns | {"prompts": prompts, "completions": completions} | extras',
            'keywords = {"prompts": prompts, "completions": completions} | extras | columns',
        ),
        ("for name, values in columns.items() if name not in positional}", "for name, values in columns.items()}"),
        (
            "return (), keywords if takes_all else {name: value for name, value in keywords.items() if name in named}",
            "return (), keywords",
        ),
        ("copy.deepcopy(list(inputs.chats or [None] * len(inputs)))", "inputs.chats"),
        ('if "responses" in named:', "if False:"),
        ('return alone or "completions" in named', 'return "completions" in named'),
        ('or named[:1] == ["completion_ids"]', ""),
        ("chat = copy.deepcopy(chat)", "pass"),
        ('beginning = chat.pop()["content"] if continues else ""', 'beginning = ""'),
        ('"content": beginning + response', '"content": response'),
        (
            "return (list(inputs.prompts), list(inputs.responses)), keywords",
            "return (inputs.prompts, inputs.responses), keywords",
        ),
    ),
    *variants(
        "hub/export.py",
        _EXPORT,
        ('"gpt_neox": ("rotary_emb_base", "rotary_pct")', ""),
        ('content["torch_dtype"] = content["dtype"]', "pass"),
        ('fields["rope_local_base_freq"] = sliding["rope_theta"]', "pass"),
        ("fields[theta] = parameters", 'fields["rope_theta"] = parameters'),
        ("fields[share] = parameters", "parameters"),
        ('None if parameters["rope_type"] == "default" else scaling', "scaling"),
        ('if kind == "phi3" and', 'if kind == "none" and'),
        ('scaling.pop("factor", None)', "pass"),
        ("content.pop(name, None)", "pass"),
        ('content["additional_special_tokens"] = content.pop("extra_special_tokens")', "pass"),
        ('content["model_input_names"] =', 'content["no_such"] ='),
        ('content["padding_side"] =', 'content["no_such"] ='),
        ('content["tokenizer_class"] = "PreTrainedTokenizerFast"', "pass"),
        ("save_jinja_files=not isinstance(tokenizer.chat_template, dict)", "save_jinja_files=True"),
    ),
    *variants(
        "hub/scalar_head.py",
        _HEADS,
        ("if deep:", "if False:"),
        ('if len(heads) > 1 or any(f"{head}.weight"', 'if any(f"{head}.weight"'),
        ('or any(f"{head}.weight" not in source.shapes for head in heads)', ""),
        ("return float(source.read(name).reshape(()))", "return 0.0"),
        ("if source.shapes[name] not in ((1,), ()):", "if False:"),
        ("if shape in ((1, width), (width, 1)) and", "if shape == (1, width) and"),
        ("if (path / name).is_file():", "if False:"),
        ("any(_CLASSIFIER.search(str(name))", "any(False"),
        *((f'    "{name}",', "") for name in ("v_head.summary", "v_head", "value_head", "classifier", "model.score")),
    ),
    *variants(
        "cli/flags.py",
        _LINE,
        ("sys.exit(2)", "sys.exit(1)"),
        ("local_path(name), packaged_configs()", "Path(name), packaged_configs()"),
        ("get_config(parameter) if colon else get_config()", "get_config()"),
        ("if not isinstance(config, ConfigDict):", "if False:"),
        ("if match and match[2] not in fields:", "if False:"),
        ('if text == "None":', "if False:"),
        ('if text[:1] in ("(", "["):', "if False:"),
        ("for element in found if element.strip()]", "for element in found]"),
        ("(kind is not str or all(isinstance(part, str) for part in value))", "True"),
    ),
    *variants(
        "settings.py",
        "tests/cli/test_flags.py tests/ppo/test_config.py",
        ('rpartition(".")[2]\n    for pattern, feature', 'rpartition(".")[0]\n    for pattern, feature'),
        ("if last in _OTHER_NAMES and not same:", "if False:"),
        ("near = same or difflib.get_close_matches(", "near = difflib.get_close_matches("),
        ("if path == former or path", "if path"),
        ('or path.startswith(f"{former}."):', ":"),
        ("now = new_name(path or name)", "now = new_name(name)"),
        ('path = f"{where}.{name}".removeprefix("config.")', 'path = f"{where}.{name}"'),
        ('if section == "reward_training" else None', "if False else None"),
        ("and not isinstance(value, bool):\n            return float", ":\n            return float"),
        ("type(value) is option", "isinstance(value, option)"),
    ),
]
