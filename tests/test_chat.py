"""What a model reads: chat templates and their quirks, plain models, and input that makes no sense."""

from __future__ import annotations

import io
import logging
import warnings

import checkpoints
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BatchEncoding
from transformers.utils import logging as hf_logging

from specbeam.chat import render_prompt, show_rendered
from specbeam.errors import InputError

TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "Why is the sky blue?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> the folder of its tokenizer (and model), made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = checkpoints.make_checkpoint(family, tmp_path_factory.mktemp("family") / family)
        return made[family]

    return make


@pytest.fixture
def tokenizer(folder):
    """family -> a tokenizer of its own, as transformers loads it."""
    return lambda family: AutoTokenizer.from_pretrained(folder(family))


def rendered(tokenizer, prompt, **options):
    """Text and ids of one prompt that must not give a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = render_prompt(tokenizer, [prompt], **options)
    return batch.text[0], batch.input_ids[0].tolist()


@pytest.mark.parametrize("family", [name for name in checkpoints.FAMILIES if "gpt2" not in name])
@pytest.mark.parametrize("conversation", [TURNS[:1], TURNS, [SYSTEM, *TURNS]], ids=["one", "several", "system"])
def test_a_chat_model_reads_exactly_what_apply_chat_template_gives(tokenizer, family, conversation):
    tokenizer = tokenizer(family)
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    text, ids = rendered(tokenizer, conversation)
    assert ids == expected
    assert text == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def test_a_string_is_one_user_message_and_the_system_prompt_goes_before_it(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    assert rendered(qwen, "Hello", system_prompt="Be brief.") == rendered(qwen, [SYSTEM, TURNS[0]])
    assert "You are Qwen" in rendered(qwen, "Hello")[0], "without a system prompt the template's own stays"
    assert "You are Qwen" not in rendered(qwen, "Hello", system_prompt="")[0], "an empty one replaces it"


def test_a_conversations_own_system_message_wins_over_the_system_prompt(tokenizer):
    text, _ = rendered(tokenizer("qwen2.5-3b-instruct"), [SYSTEM, TURNS[0]], system_prompt="Be verbose.")
    assert "Be brief." in text and "verbose" not in text


def test_rows_are_padded_on_the_left_and_masked(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    batch = render_prompt(qwen, ["Hello", TURNS])
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.long
    for row, prompt in enumerate(["Hello", TURNS]):
        kept = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        assert kept == rendered(qwen, prompt)[1]
        assert (batch.attention_mask[row].diff() >= 0).all(), "padding comes first"


def test_a_tokenizer_without_pad_token_is_padded_with_a_legal_id_and_left_unchanged(tokenizer):
    gpt2 = tokenizer("gpt2")
    assert gpt2.pad_token is None
    batch = render_prompt(gpt2, ["Hello", "Why is the sky blue?"])
    assert batch.input_ids[0, 0] == gpt2.eos_token_id
    assert gpt2.pad_token is None


def test_a_template_that_writes_the_bos_is_not_given_a_second_one(tokenizer):
    gemma = tokenizer("gemma-3-4b-it")
    _, ids = rendered(gemma, "Hello")
    assert ids.count(gemma.bos_token_id) == 1 and ids[0] == gemma.bos_token_id
    assert gemma(rendered(gemma, "Hello")[0]).input_ids[:2] == [gemma.bos_token_id] * 2, "the trap is there"


def test_a_plain_text_that_already_has_a_bos_is_not_given_a_second_one(tokenizer):
    llama = tokenizer("tinyllama-1.1b-chat")
    llama.chat_template = None
    assert rendered(llama, "<s>Hello")[1].count(llama.bos_token_id) == 1
    assert rendered(llama, "Hello")[1][0] == llama.bos_token_id, "one that the tokenizer adds stays"


def test_an_eos_that_the_tokenizer_puts_behind_a_plain_text_is_taken_off(tokenizer):
    llama = tokenizer("tinyllama-1.1b-chat")
    llama.chat_template = None
    expected = rendered(llama, "Hello")[1]

    class Closing:
        """A tokenizer that closes every text."""

        chat_template = None

        def __call__(self, *args, **kwargs):
            return {"input_ids": [*llama(*args, **kwargs)["input_ids"], llama.eos_token_id]}

        def __getattr__(self, name):
            return getattr(llama, name)

    assert rendered(Closing(), "Hello")[1] == expected
    assert rendered(llama, "Hello</s>")[1][-1] == llama.eos_token_id, "one that the user wrote stays"


@pytest.mark.parametrize("shape", ["tensor", "list", "batch encoding"])
def test_it_does_not_matter_what_apply_chat_template_returns_in_this_version(tokenizer, monkeypatch, shape):
    qwen = tokenizer("qwen2.5-3b-instruct")
    expected = rendered(qwen, "Hello")[1]
    original = type(qwen).apply_chat_template

    def of_another_version(self, *args, tokenize=True, **kwargs):
        text = original(self, *args, tokenize=False, **kwargs)
        ids = self(text, add_special_tokens=False).input_ids
        forms = {"tensor": torch.tensor([ids]), "list": ids, "batch encoding": BatchEncoding({"input_ids": ids})}
        return forms[shape] if tokenize else text

    monkeypatch.setattr(type(qwen), "apply_chat_template", of_another_version)
    assert rendered(qwen, "Hello")[1] == expected


def test_a_refused_system_role_is_folded_into_the_first_user_turn_and_said_once(tokenizer):
    gemma = tokenizer("gemma-3-4b-it")
    folding = gemma.chat_template
    gemma.chat_template = checkpoints.GEMMA_WITHOUT_SYSTEM
    with pytest.warns(UserWarning, match="takes no system role") as said:
        batch = render_prompt(gemma, ["Hello", TURNS], system_prompt="Be brief.")
    assert len(said) == 1
    gemma.chat_template = folding
    assert batch.text == [rendered(gemma, prompt, system_prompt="Be brief.")[0] for prompt in ("Hello", TURNS)]


def test_a_silently_dropped_system_message_is_folded_too(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    qwen.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}"
        "{% endfor %}[assistant]"
    )
    with pytest.warns(UserWarning, match="takes no system role"):
        batch = render_prompt(qwen, ["Hello"], system_prompt="Be brief.")
    assert batch.text == ["[user] Be brief.\n\nHello\n[assistant]"]


def test_roles_that_must_alternate_are_joined_where_they_do_not_and_it_is_said_once(tokenizer):
    gemma = tokenizer("gemma-3-4b-it")
    twice = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "How are you?"}]
    with pytest.warns(UserWarning, match="alternate") as said:
        batch = render_prompt(gemma, [twice, twice])
    assert len(said) == 1
    assert batch.text[0] == rendered(gemma, "Hello\n\nHow are you?")[0]
    qwen = tokenizer("qwen2.5-3b-instruct")
    assert rendered(qwen, twice)[0].count("<|im_start|>user") == 2, "a template that takes them gets them as they are"


def test_a_template_may_need_both_changes(tokenizer):
    gemma = tokenizer("gemma-3-4b-it")
    gemma.chat_template = checkpoints.GEMMA_WITHOUT_SYSTEM
    with pytest.warns(UserWarning) as said:
        batch = render_prompt(gemma, [[SYSTEM, TURNS[0], TURNS[2]]])
    assert len(said) == 2
    assert "user\nBe brief.\n\nHello\n\nWhy is the sky blue?<end_of_turn>" in batch.text[0]


def test_a_conversation_that_the_template_refuses_anyway_names_the_prompt_and_the_reason(tokenizer):
    with pytest.raises(InputError, match=r"^Prompt 2 does not fit .* must alternate"):
        render_prompt(tokenizer("gemma-3-4b-it"), ["Hello", TURNS[1:]])


def test_a_last_assistant_message_is_continued(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    text, ids = rendered(qwen, [*TURNS, {"role": "assistant", "content": "Because light"}])
    assert text.endswith("<|im_start|>assistant\nBecause light")
    assert ids[-1] != qwen.eos_token_id
    assert rendered(qwen, [*TURNS, {"role": "assistant", "content": ""}]) == rendered(qwen, TURNS)


@pytest.mark.parametrize("form", ["dict", "list"])
def test_among_named_templates_the_default_one_is_used(tokenizer, form):
    qwen = tokenizer("qwen2.5-3b-instruct")
    expected = rendered(qwen, "Hello")
    named = {"tool_use": "unused", "default": qwen.chat_template}
    qwen.chat_template = named if form == "dict" else [{"name": n, "template": t} for n, t in named.items()]
    assert rendered(qwen, "Hello") == expected


def test_a_single_named_template_is_used_and_several_without_a_default_are_asked_about(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    expected = rendered(qwen, "Hello")
    qwen.chat_template = {"chat": qwen.chat_template}
    assert rendered(qwen, "Hello") == expected
    qwen.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(InputError, match="rag, tool_use and none named default"):
        render_prompt(qwen, ["Hello"])


def test_a_plain_model_reads_the_text_as_it_is(tokenizer):
    gpt2 = tokenizer("gpt2")
    text, ids = rendered(gpt2, "  Once upon a time\n")
    assert text == "  Once upon a time\n"
    assert gpt2.decode(ids) == text
    assert rendered(gpt2, [{"role": "user", "content": "Hello"}])[0] == "Hello"


@pytest.mark.parametrize("empty", [None, {}, [], ""])
def test_an_attribute_without_a_template_makes_a_plain_model(tokenizer, empty):
    qwen = tokenizer("qwen2.5-3b-instruct")
    qwen.chat_template = empty
    assert rendered(qwen, "Hello")[0] == "Hello"


def test_a_plain_model_gets_the_system_prompt_before_the_text_and_it_is_said_once(tokenizer):
    with pytest.warns(UserWarning, match="no chat template, so the system prompt") as said:
        batch = render_prompt(tokenizer("gpt2"), ["Hello", "How are you?"], system_prompt="Be brief.")
    assert len(said) == 1
    assert batch.text == ["Be brief.\n\nHello", "Be brief.\n\nHow are you?"]


def test_a_plain_model_gets_the_turns_joined_by_blank_lines_and_it_is_said(tokenizer):
    with pytest.warns(UserWarning, match="joined by blank lines"):
        batch = render_prompt(tokenizer("gpt2"), [TURNS])
    assert batch.text == ["Hello\n\nHow are you?\n\nWhy is the sky blue?"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "There are no prompts"),
        ("Hello", "prompts is of type str: give a list"),
        (TURNS[0], "prompts is of type dict: give a list"),
        ([3], "Prompt 1 is of type int: give a string or a list"),
        (["Hello", []], "Prompt 2 is an empty list of messages"),
        (["Hello", ["Hi"]], "Message 1 of prompt 2 is of type str"),
        ([[{"content": "Hi"}]], "Message 1 of prompt 1 has no role"),
        ([[{"role": "user"}]], "Message 1 of prompt 1 has no content"),
        ([[{}]], "has no role and no content"),
        ([[{"role": "robot", "content": "Hi"}]], "unknown role 'robot': use system, user, assistant"),
        ([[{"role": "user", "content": 3}]], "content of message 1 of prompt 1 is of type int"),
        ([[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]], "is of type list: give its text"),
        ([[SYSTEM]], "Prompt 1 holds only a system message"),
    ],
)
def test_prompts_that_make_no_sense_get_one_sentence(tokenizer, prompts, message):
    with pytest.raises(InputError, match=message) as caught:
        render_prompt(tokenizer("qwen2.5-3b-instruct"), prompts)
    assert "\n" not in str(caught.value)


def test_a_text_without_a_single_token_cannot_be_continued(tokenizer):
    with pytest.raises(InputError, match="Prompt 2 is empty"):
        render_prompt(tokenizer("gpt2"), ["Hello", ""])
    assert rendered(tokenizer("qwen2.5-3b-instruct"), "")[1], "an empty turn in a chat has its markers"


def test_a_system_prompt_must_be_text(tokenizer):
    with pytest.raises(InputError, match="system_prompt is of type int"):
        render_prompt(tokenizer("gpt2"), ["Hello"], system_prompt=3)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_generate_never_complains_about_a_missing_attention_mask(tokenizer, folder, family, caplog):
    from specbeam.models import load_model

    model, tokenizer = load_model(folder(family), device="cpu")
    batch = render_prompt(tokenizer, ["Hello", "Why is the sky blue?"])
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    hf_logging.set_verbosity_warning()  # a command in another test may have silenced it
    logging.getLogger("transformers").propagate = True  # so that caplog sees it
    hf_logging.get_logger().warning_once.__func__.cache_clear()
    try:
        out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
        complaints = caplog.text.lower()
        model.generate(batch.input_ids, **options)
    finally:
        logging.getLogger("transformers").propagate = False
    assert out.shape[1] == batch.input_ids.shape[1] + 2
    assert "attention mask" not in complaints and "pad_token_id" not in complaints
    if family == "gpt2":
        assert "attention mask" in caplog.text.lower(), "without the mask it does complain"


def shown(tokenizer, batch, **options):
    stream = io.StringIO()
    show_rendered(tokenizer, batch, "target", console=Console(file=stream, width=60, **options))
    return stream.getvalue()


def test_what_is_shown_is_what_the_model_reads_special_tokens_and_counts_included(tokenizer):
    qwen = tokenizer("qwen2.5-3b-instruct")
    batch = render_prompt(qwen, ["Hello", TURNS])
    out = shown(qwen, batch)
    assert all(text in out for text in batch.text)
    assert f"prompt 1 of 2 · {batch.attention_mask[0].sum()} tokens" in out
    assert "<|endoftext|>" not in out, "padding is not shown"
    assert "\x1b[1;35m<|im_start|>" in shown(qwen, batch, force_terminal=True, color_system="standard")


def test_a_bos_that_the_tokenizer_adds_is_shown_though_it_is_not_in_the_text(tokenizer):
    llama = tokenizer("tinyllama-1.1b-chat")
    llama.chat_template = None
    batch = render_prompt(llama, ["Hello"])
    assert batch.text == ["Hello"]
    assert "<s>" in shown(llama, batch)


def test_markup_and_long_lines_in_a_prompt_are_shown_as_they_are(tokenizer):
    prompt = "[bold]Be brief[/bold] [/] :smile: " + "fox " * 40
    assert prompt in shown(tokenizer("gpt2"), render_prompt(tokenizer("gpt2"), [prompt]))
