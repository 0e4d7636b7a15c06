"""Multiple choice in cloze form: the question alone, the options' texts as its continuations."""

import pytest
from support.tasks import write_questions

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig, EvalConfig
from zflora_jax.data.builders.published import FORMATS, answers
from zflora_jax.data.encoding import encode_examples, encode_options
from zflora_jax.data.task import as_cloze, listed_options
from zflora_jax.data.tasks import TASKS, Example, load_examples
from zflora_jax.evaluation.contamination import contaminated, questions
from zflora_jax.evaluation.records import _chosen, likelihood_records


def example(row: dict) -> Example:
    return TASKS["arc_easy"].example(row)


OVEN = {"sentence": "It did not fit in the oven as the _ was big.", "label": "0"}
ICE = {"goal": "ice box", "sol1": "add water\n\nto it", "sol2": "add soda to it", "label": 0}
JUMP = {"activity_label": "High jump", "ctx": "A boy runs. the boy", "label": 1}
QUESTION = "Question: {}\nAnswer:"
# Rows, the form of their prompts, and the prompt, the options and the target of their cloze form.
ROWS = {
    "arc": (
        answers("Which is soft?", ["a rock", "fur: Answer1: yes", "ice"], 1),
        QUESTION,
        "Question: Which is soft?\nAnswer:",
        (" a rock", " fur: Answer1: yes", " ice"),
        1,
    ),
    "a question with a label in it": (
        answers("Answer1: was it? Is it Answer2: or", ["no", "yes"], 1),
        "{}",
        "Answer1: was it? Is it Answer2: or",
        (" no", " yes"),
        1,
    ),
    "piqa": (
        FORMATS["piqa"].read(ICE),
        QUESTION,
        "Question: ice box\nAnswer:",
        (" add water\n\nto it", " add soda to it"),
        0,
    ),
    "hellaswag": (
        FORMATS["hellaswag"].read(JUMP | {"endings": ["sits.", "jumps.", "a", "b"]}),
        "{}",
        "High jump: A boy runs. the boy",
        (" sits.", " jumps.", " a", " b"),
        1,
    ),
    "winogrande": (
        FORMATS["winogrande"].read(OVEN | {"option1": "cake", "option2": "oven"}),
        "{}",
        "It did not fit in the oven as the",
        (" cake was big.", " oven was big."),
        0,
    ),
    "a blank that is no option's": (
        answers("The sun is a _ of light.", ["source", "sink"], 0),
        "{}",
        "The sun is a _ of light.",
        (" source", " sink"),
        0,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_options_become_continuations(name):
    [row], form, prompt, options, gold = ROWS[name]
    letters = example(row)
    found = as_cloze(letters, form)
    assert (found.prompt, found.options) == (prompt, options)
    assert found.target == options[gold] and found.answer == options[gold].strip()
    assert found.plain and found.asked == letters.prompt
    # A model that saw one form has seen the other.
    assert contaminated([found], questions([letters])) == [True]
    assert contaminated([letters], questions([found])) == [True]


LISTED = "Please choose the correct answer to the question: x\n\nAnswer1: a"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Which is soft? Answer1: a", "this row is 'Which is soft"),
        (f"{LISTED}\n\nAnswer format: answer1/answer2", "this row lists no 'Answer2'"),
        (f"{LISTED} Answer2:\n\nAnswer format: answer1/answer2", "an option of .* is empty"),
    ],
)
def test_rows_in_other_words_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        listed_options(prompt)


def test_tasks_in_cloze_form_read_the_same_files(tmp_path, model):
    questions = [f"Please choose the correct answer to the question: {i}?" for i in range(12)]
    questions = [
        f"{q}\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2" for q in questions
    ]
    fields = {"answer": "answer2", "output": "the correct answer is answer2"}
    for split in ("train", "test"):
        write_questions(tmp_path / "ARC-Easy" / f"{split}.json", questions, **fields)
    data = DataConfig(data_dir=str(tmp_path))
    letters = load_examples("arc_easy", "test", data)[3]
    cloze = load_examples("arc_easy_cloze", "test", data)[3]
    assert cloze.asked == letters.prompt and len(cloze.options) == len(letters.options)
    assert TASKS["arc_easy_cloze"].score(TASKS["arc_easy_cloze"].parse(cloze.target), cloze.answer)
    # In every style the prompt is the text as it is, and what is learned is the option.
    ((ids, mask),) = encode_examples([cloze], model.tokenizer, data)
    assert model.tokenizer.decode(ids[:-1]) == cloze.prompt + cloze.target
    assert model.tokenizer.decode(ids[mask][:-1]) == cloze.target


def test_likelihoods_are_divided_by_the_characters_of_the_option_alone():
    """The space that separates an option from the prompt is no character of it."""
    cloze = as_cloze(example(*ROWS["arc"][0]), "{}")  # " a rock", " fur: Answer1: yes", " ice"
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
    cloze = as_cloze(example(*ROWS["piqa"][0]), "{}")
    prompt = [ord(c) for c in f" {cloze.prompt}"]
    start, options = encode_options(cloze, prompt, PrefixSpace())
    assert start == prompt
    assert ["".join(map(chr, ids)) for ids in options] == list(cloze.options)
    start, options = encode_options(cloze, [*prompt[:-1], 1000], PrefixSpace())  # joined with what
    assert start == prompt[:-1] and options[0][0] == prompt[-1]  # follows
    letters = example(*ROWS["piqa"][0])
    assert encode_options(letters, prompt, PrefixSpace())[1][0][0] == ord(" ")


def test_likelihoods_of_cloze_examples_are_computed(model):
    cloze = as_cloze(example(*ROWS["arc"][0]), "{}")
    settings = EvalConfig(batch_size=2, max_new_tokens=4)
    (record,) = likelihood_records(model, [cloze], DataConfig(), settings)
    sums = record["log_likelihoods"]
    assert len(sums) == 3 and max(sums) < 0
    assert record["correct_sum"] == (max(sums) == sums[1])
