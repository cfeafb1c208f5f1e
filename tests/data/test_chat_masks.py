import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Record, encode, encode_all
from lorax.errors import LoraxError


def turn(role, content):
    return {"role": role, "content": content}


def learnt(tokenizer, example):
    """The text of each unbroken stretch of tokens that carry loss."""
    stretches, last = [], 0.0
    for token, weight in zip(example.ids, example.token_weights, strict=True):
        if weight and not last:
            stretches.append([])
        if weight:
            stretches[-1].append(token)
        last = weight
    return [tokenizer.show(ids) for ids in stretches]


def test_a_prompt_becomes_a_user_turn_and_the_end_of_turn_is_learnt(tokenizer):
    example = encode(Record("2+2", "4"), tokenizer)
    prompt = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.show(example.prompt_ids) == prompt
    assert tokenizer.show(example.completion_ids) == "4<|im_end|>"
    assert example.weights is None


def test_the_prompt_is_what_generation_would_give_the_model(tokenizer):
    turns = (turn("system", "s"), turn("user", "q"))
    example = encode(Record(turns, "hello"), tokenizer)
    assert list(example.prompt_ids) == tokenizer.encode_chat(turns, add_generation_prompt=True)


def test_every_assistant_turn_is_learnt_and_nothing_else(tokenizer):
    before = (turn("user", "a"), turn("assistant", "first"), turn("user", "b"), turn("assistant", "second"))
    example = encode(Record((*before, turn("user", "c")), "third"), tokenizer)
    assert learnt(tokenizer, example) == ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]
    whole = tokenizer.encode_chat([*before, turn("user", "c"), turn("assistant", "third")], add_generation_prompt=False)
    assert list(example.ids) == whole[:-1]  # but the newline after the last end of turn


def test_a_border_that_tokens_cross_is_encoded_in_parts(tokenizer):
    # The header's newline and the answer's are one token of the whole: the prompt's tokens are no prefix.
    example = encode(Record("q", "\nyes"), tokenizer)
    turns = [turn("user", "q")]
    assert list(example.prompt_ids) == tokenizer.encode_chat(turns, add_generation_prompt=True)
    assert learnt(tokenizer, example) == ["\nyes<|im_end|>"]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last(tokenizer_with):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'][-1:] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    example = encode(Record((turn("user", "a"), turn("assistant", "long"), turn("user", "b")), "answer"), tokenizer)
    assert learnt(tokenizer, example) == ["answer<|im_end|>"]


def test_a_template_without_an_end_of_turn_gets_one(tokenizer_with):
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = tokenizer_with(template)
    example = encode(Record("q", "yes"), tokenizer)
    assert tokenizer.show(example.ids) == "user:q;assistant:yes;<|im_end|>"
    assert learnt(tokenizer, example) == ["yes;<|im_end|>"]


def test_plain_text_has_no_template(tokenizer):
    example = encode(Record("2+2=", "4"), tokenizer, template=False)
    assert (tokenizer.show(example.prompt_ids), tokenizer.show(example.completion_ids)) == ("2+2=", "4<|im_end|>")
    assert encode(Record("", "4"), tokenizer, template=False).prompt_ids == (tokenizer.bos_id,)


def test_plain_text_that_tokens_cross_is_encoded_in_parts(tokenizer):
    example = encode(Record("a\n", "\nb"), tokenizer, template=False)
    assert example.prompt_ids == tuple(tokenizer.encode("a\n"))
    assert tokenizer.show(example.completion_ids) == "\nb<|im_end|>"
    assert len(tokenizer.encode("a\n\nb")) < len(example.ids) - 1  # the two newlines would have been one token


def test_a_base_model_without_a_template(tokenizer_with):
    tokenizer = tokenizer_with(None)
    assert tokenizer.show(encode(Record("a", "b"), tokenizer).ids) == "ab<|im_end|>"
    with pytest.raises(LoraxError, match="no chat template"):
        encode(Record("a", "b"), tokenizer, template=True)
    with pytest.raises(LoraxError, match=r"^f\.jsonl:3: a conversation needs a chat template"):
        encode(Record((turn("user", "a"),), "b", "f.jsonl:3"), tokenizer)


def test_a_tokenizer_that_cannot_end_is_refused(tokenizer_with):
    tokenizer = tokenizer_with()
    tokenizer.eos_id = None
    with pytest.raises(LoraxError, match="no end-of-sequence"):
        encode(Record("a", "b"), tokenizer)


def test_long_examples_are_dropped_and_counted(tokenizer):
    said = []
    records = [Record("a", "b" * n) for n in (1, 50, 2, 60)]
    examples = encode_all(records, tokenizer, seq_len=40, template=False, say=said.append)
    assert examples.lengths.tolist() == [2, 3]
    assert said == ["dropped 2 of 4 examples that are longer than seq_len=40 (the longest takes 61)"]
    with pytest.warns(UserWarning, match="dropped 2 of 4"):
        encode_all(records, tokenizer, seq_len=40, template=False)


def test_an_example_that_just_fits_is_kept(tokenizer):
    assert len(encode_all([Record("a", "bcd")], tokenizer, seq_len=4, template=False)) == 1
    with pytest.raises(LoraxError, match=r"all 1 examples are longer than seq_len=3 \(the longest takes 4\)"):
        encode_all([Record("a", "bcd")], tokenizer, seq_len=3, template=False)


def test_no_records_at_all(tokenizer):
    with pytest.raises(LoraxError, match="dataset is empty"):
        encode_all([], tokenizer, seq_len=8)


words = st.text(st.sampled_from("hel \n<é"), min_size=1, max_size=6)


@given(asked=st.lists(st.tuples(words, words), max_size=2), last=st.tuples(words, words))
def test_whatever_is_said_the_last_answer_is_learnt_to_its_end(tokenizer, asked, last):
    turns = [t for a, b in asked for t in (turn("user", a), turn("assistant", b))]
    example = encode(Record((*turns, turn("user", last[0])), last[1]), tokenizer)
    stretches = learnt(tokenizer, example)
    assert stretches[-1] == last[1] + "<|im_end|>"
    assert len(stretches) in (1, len(asked) + 1)
    assert example.completion_ids[-1] == tokenizer.eos_id
