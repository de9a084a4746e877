"""The chat with a model: a message gives a response."""

import pytest
from jax import random

from jax_rlhf import Pretrained, chat, load_pretrained
from jax_rlhf.hub import config_from_hub
from jax_rlhf.models import Decoder, init_params
from tests.cli import tiny
from tests.data import tiny as data


def user(text):
    return {"role": "user", "content": text}


def says(monkeypatch, pretrained, messages, **options):
    """The response, and the sampler's arguments per call: (ids, settings)."""
    asked = []

    def sample(model, params, prompts, mask, key, **more):
        asked.append((prompts[mask].tolist(), more))
        return chat_sample(model, params, prompts, mask, key, **more)

    chat_sample = chat.sample
    with monkeypatch.context() as patch:
        patch.setattr(chat, "sample", sample)
        return chat.answer(pretrained, messages, random.key(0), **{"max_new_tokens": 4} | options), asked


def test_a_chat_uses_the_template_or_without_one_the_last_message(monkeypatch, tmp_path):
    pretrained = load_pretrained(tiny.checkpoint(tmp_path / "model"))
    answer, ((ids, _),) = says(monkeypatch, pretrained, [user("a b"), {"role": "assistant", "content": "c"}, user("d")])
    assert ids == data.ids("<user> a b <eos> <assistant> c <eos> <user> d <eos> <assistant>")
    assert set(answer.split()) <= set(data.WORDS)
    plain = tiny.checkpoint(tmp_path / "plain", tokenizer=data.tokenizer(bos=True, template=None))
    _, ((ids, _),) = says(monkeypatch, load_pretrained(plain), [user("x"), user("a b")])
    assert ids == data.ids("<bos> a b")
    _, ((ids, _),) = says(
        monkeypatch, pretrained, [user("a <eos> <bos> b")]
    )  # special tokens that a user types are not special
    assert ids == data.ids("<user> a <pad> <pad> b <eos> <assistant>")


def test_the_number_of_positions_bounds_the_response_and_the_chat(monkeypatch):
    shape = {"model_type": "gpt2", "vocab_size": len(data.WORDS), "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = Decoder(config_from_hub(shape | {"n_positions": 12, "eos_token_id": data.EOS}))
    pretrained = Pretrained(model, init_params(model, random.key(0)), data.tokenizer())
    _, ((ids, options),) = says(monkeypatch, pretrained, [user("a b c")], max_new_tokens=256)
    assert len(ids) + options["max_new_tokens"] == 12
    with pytest.raises(ValueError, match="the chat has 15 tokens, but the model only 12 positions"):
        chat.answer(pretrained, [user(" ".join("a" * 12))], random.key(0), max_new_tokens=4)
