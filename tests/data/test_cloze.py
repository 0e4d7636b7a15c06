"""Multiple choice in cloze form: the question alone, the options' texts as its continuations."""

from dataclasses import replace

import pytest
from support.tasks import write_questions

from zflora_jax import ConfigError, DataConfig, EvalConfig
from zflora_jax.data.encoding import encode_examples, encode_options
from zflora_jax.data.task import as_cloze, listed_options
from zflora_jax.data.tasks import TASKS, load_examples
from zflora_jax.evaluation.contamination import contaminated, questions
from zflora_jax.evaluation.records import _chosen, likelihood_records


def listed(question, *texts, gold=0, word="answer", between=" "):
    """An example in LLM-Adapters' words."""
    names = [f"{word}{i + 1}" for i in range(len(texts))]
    options = between.join(f"{x.title()}: {text}" for x, text in zip(names, texts, strict=True))
    noun = "answer" if word == "option" else word
    prompt = f"Please choose the correct {noun} {question}\n\n{options}\n\nAnswer format: "
    row = {"prompt": prompt + "/".join(names), "target": f"the correct answer is {names[gold]}"}
    return TASKS["arc_easy"].example(row | {"answer": names[gold]})


FUR = ("a rock", "fur: Answer1: yes", "ice")
ICE = ("add water\n\nto it", "add soda to it")
QUESTION = "Question: {}\nAnswer:"
ARC = listed("to the question: Which is soft?", *FUR, gold=1)
PIQA = listed("to the question: ice box", *ICE, word="solution", between="\n\n")
LABEL = "Answer1: was it? Is it Answer2: or"
BLANK = "to fill in the blank to complete the given sentence: "
OVEN, SUN = "It did not fit in the oven as the _ was big.", "The sun is a _ of light."
RUN = "High jump: A boy runs. the boy"
JUMP = listed(f"to complete the given sentence: {RUN}", "sits.", "jumps.", gold=1, word="ending")
# Examples, the form of their prompts, and the prompt and the options of their cloze form.
CASES = {
    "arc": (ARC, QUESTION, "Question: Which is soft?\nAnswer:", tuple(f" {x}" for x in FUR)),
    "a question with a label in it": (
        *(listed(f"to the question: {LABEL}", "no", "yes", gold=1), "{}"),
        *(LABEL, (" no", " yes")),
    ),
    "piqa": (PIQA, QUESTION, "Question: ice box\nAnswer:", tuple(f" {x}" for x in ICE)),
    "hellaswag": (JUMP, "{}", RUN, (" sits.", " jumps.")),
    "winogrande": (
        *(listed(BLANK + OVEN, "cake", "oven", word="option"), "{}"),
        *("It did not fit in the oven as the", (" cake was big.", " oven was big.")),
    ),
    "a blank that is no option's": (
        *(listed(f"to the question: {SUN}", "source", "sink"), "{}"),
        *(SUN, (" source", " sink")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_options_become_continuations(name):
    letters, form, prompt, options = CASES[name]
    found, gold = as_cloze(letters, form), letters.options.index(letters.target)
    assert (found.prompt, found.options) == (prompt, options)
    assert found.target == options[gold] and found.answer == options[gold].strip()
    assert found.plain and found.asked == letters.prompt
    # A model that saw one form has seen the other.
    assert contaminated([found], questions([letters])) == [True]
    assert contaminated([letters], questions([found])) == [True]
    # In cloze form it does not read the options, so the question with others is the same.
    other = replace(letters, prompt="1: not ".join(letters.prompt.rsplit("1: ", 1)))
    assert contaminated([as_cloze(other, form), other], questions([found])) == [True, False]
    assert contaminated([found], questions([other])) == [True]


LISTED = "Please choose the correct answer to the question: x\n\nAnswer1: a"
FORMAT = "\n\nAnswer format: answer1/answer2"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Which is soft? Answer1: a", "'Which is soft. Answer1: a' is another"),
        (LISTED + FORMAT, "lists no 'Answer2'"),
        (f"{LISTED} Answer2:{FORMAT}", "an option of .* is empty"),
    ],
)
def test_rows_in_other_words_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        listed_options(prompt)


def test_tasks_in_cloze_form_read_the_same_files(tmp_path, model):
    head, tail = "Please choose the correct answer to the question: ", "Answer1: a Answer2: b"
    questions = [f"{head}{i}?\n\n{tail}\n\nAnswer format: answer1/answer2" for i in range(12)]
    fields = {"answer": "answer2", "output": "the correct answer is answer2"}
    write_questions(tmp_path / "ARC-Easy" / "test.json", questions, **fields)
    data = DataConfig(data_dir=str(tmp_path))
    letters = load_examples("arc_easy", "test", data)[3]
    cloze = load_examples("arc_easy_cloze", "test", data)[3]
    assert cloze.asked == letters.prompt and len(cloze.options) == len(letters.options)
    scored = TASKS["arc_easy_cloze"].answers
    assert scored.score(scored.parse(cloze.target), cloze.answer)
    # In every style the prompt is the text as it is, and what is learned is the option.
    ((ids, mask),) = encode_examples([cloze], model.tokenizer, data)
    assert model.tokenizer.decode(ids[:-1]) == cloze.prompt + cloze.target
    assert model.tokenizer.decode(ids[mask][:-1]) == cloze.target
    (record,) = likelihood_records(model, [cloze], data, EvalConfig(batch_size=2, max_new_tokens=4))
    sums = record["log_likelihoods"]
    assert len(sums) == 2 and max(sums) < 0 and record["correct_sum"] == (max(sums) == sums[1])


def test_likelihoods_are_divided_by_the_characters_of_the_option_alone():
    """The space that separates an option from the prompt is no character of it."""
    cloze = as_cloze(ARC, "{}")  # " a rock", " fur: Answer1: yes", " ice"
    assert [len(option) - 1 for option in cloze.options] == [6, 17, 3]
    # Per character -1.0, -1.005 and -1.1; with the space -0.857, -0.949 and -0.825.
    found = _chosen([-6.0, -17.085, -3.3], cloze)
    assert not found["correct_norm"] and not found["correct_sum"]
    assert _chosen([-6.0, -16.9, -3.3], cloze)["correct_norm"]  # -0.994; with the space it is last


class PrefixSpace:
    """A tokenizer that writes a space before a text of its own, as SentencePiece's do."""

    bos_token_id = None

    def __call__(self, texts, add_special_tokens=True):
        rows = [[ord(c) for c in " " + text] for text in texts]
        return {"input_ids": rows}


def test_options_are_tokenised_as_training_tokenises_them():
    """As one text with the prompt: no second space, and tokens that join both are the option's."""
    cloze = as_cloze(PIQA, "{}")
    prompt = [ord(c) for c in f" {cloze.prompt}"]
    start, options = encode_options(cloze, prompt, PrefixSpace())
    assert start == prompt
    assert ["".join(map(chr, ids)) for ids in options] == list(cloze.options)
    start, options = encode_options(cloze, [*prompt[:-1], 1000], PrefixSpace())  # joined with what
    assert start == prompt[:-1] and options[0][0] == prompt[-1]  # follows
    assert encode_options(PIQA, prompt, PrefixSpace())[1][0][0] == ord(" ")
