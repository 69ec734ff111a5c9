"""In-context tasks and their averages: the keys of LLM Foundry's ``icl_tasks`` and ``eval_gauntlet``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import MAX_BATCH, MAX_SEED, NAME, REQUIRED, TEXT, key
from moefoundry.config.schema_data import FimFormat


class Metric(StrEnum):
    """Metrics of tasks, with LLM Foundry's names; those of infilling, which it has not, are named alike."""

    choice_accuracy = "InContextLearningMultipleChoiceAccuracy"
    choice_calibration = "InContextLearningMCExpectedCalibrationError"
    lm_accuracy = "InContextLearningLMAccuracy"
    lm_calibration = "InContextLearningLMExpectedCalibrationError"
    exact_match = "InContextLearningGenerationExactMatchAccuracy"
    code_accuracy = "InContextLearningCodeEvalAccuracy"
    infilling_accuracy = "InfillingExactMatchAccuracy"
    infilling_similarity = "InfillingEditSimilarity"
    infilling_loss = "InfillingMiddleCrossEntropy"


@dataclass
class TaskConfig:
    """Keys that every task has."""

    label: str = key(REQUIRED, "Name of the task in metrics.", pattern=NAME)
    icl_task_type: str = key(REQUIRED, "Type of the task.", table="icl_task_types")
    dataset_uri: str = key(REQUIRED, "Examples, as JSON Lines; a path or a URL.", path=True)
    num_fewshot: list[int] = key(REQUIRED, "Numbers of solved examples before each; one evaluation for each.", ge=0)
    metric_names: list[str] = key(list, "Metrics; empty for the accuracy of the type.", pattern=TEXT)
    batch_size: int | None = key(None, "Sequences of one forward pass of one rank; null is the recipe's.", ge=1)
    max_seq_len: int | None = key(None, "Tokens of a sequence at most; null is the recipe's.", ge=2)
    prompt_string: str = key("", "Text before everything.")
    example_delimiter: str = key("\n", "Text between examples.")
    continuation_delimiter: str = key(" ", "Text between the question and the answer.")
    prelimiter: str = key("", "Text before each question.")
    fewshot_random_seed: int = key(1234, "Draws the solved examples.", ge=0, le=MAX_SEED)
    strip_dataset: bool = key(True, "Take blanks from both ends of an example's texts, and from the end of a prompt.")
    has_categories: bool = key(False, "Evaluate the examples of each value of the key category by themselves.")


@dataclass
class MultipleChoiceConfig(TaskConfig):
    """The likeliest of several answers, by the mean log-probability of its tokens."""

    context_key: str = key("query", "Key of the question.", pattern=TEXT)
    choices_key: str = key("choices", "Key of the answers.", pattern=TEXT)


@dataclass
class SchemaConfig(TaskConfig):
    """One answer after several questions: the question is chosen after which it is the likeliest."""

    choices_key: str = key("context_options", "Key of the questions.", pattern=TEXT)


@dataclass
class LanguageModelingConfig(TaskConfig):
    """A continuation, every token of which must be the likeliest."""

    context_key: str = key("context", "Key of the text before it.", pattern=TEXT)
    answer_key: str = key("continuation", "Key of the continuation.", pattern=TEXT)


@dataclass
class GenerationConfig:
    """Choice of tokens in generation."""

    max_new_tokens: int | None = key(None, "Tokens at most; null is what the longest answer needs.", ge=1, le=MAX_BATCH)
    do_sample: bool = key(False, "Draw tokens; false takes the likeliest.")
    temperature: float = key(1.0, "Divisor of the logits, for draws.", gt=0)
    top_k: int | None = key(None, "Draw among so many of the likeliest tokens.", ge=1)
    top_p: float = key(1.0, "Draw among the likeliest tokens of this probability together.", gt=0, le=1)
    seed: int = key(0, "Another seed draws others.", ge=0, le=MAX_SEED)


@dataclass
class GenerationTaskConfig(TaskConfig):
    """A generated text, which must begin with one of the answers."""

    context_key: str = key("context", "Key of the question.", pattern=TEXT)
    answer_key: str = key("answer", "Key of the answer; further right ones stand at aliases.", pattern=TEXT)
    cot_delimiter: str = key("", "Text between the chain of thought and the answer; the text behind it is judged.")
    early_stopping_criteria: list[str] = key(list, "Texts that end a generation.", pattern=TEXT)
    do_normalization: bool = key(True, "Compare without case, articles and punctuation.")
    generation_kwargs: GenerationConfig = key(GenerationConfig, "Choice of tokens.")


@dataclass
class CodeTaskConfig(TaskConfig):
    """Functions to be completed, whose tests run in a sandbox."""

    continuation_delimiter: str = key("", "Text between the prompt and the completion.")
    strip_dataset: bool = key(False, "Take blanks from both ends of an example's texts, and from the end of a prompt.")
    allow_code_execution: bool = key(False, "Run what the model writes; without it the task is refused.")
    pass_at_k: list[int] = key(lambda: [1], "Tries of which one must be right.", ge=1)
    generations_per_sample: int = key(1, "Completions of each problem.", ge=1, le=MAX_BATCH)
    timeout: float = key(3.0, "Seconds of each program.", gt=0, le=86_400)
    workers: int = key(2, "Programs that a rank runs at the same time.", ge=1, le=1024)
    generation_kwargs: GenerationConfig = key(GenerationConfig, "Choice of tokens; max_new_tokens null is 512.")


@dataclass
class InfillingConfig(TaskConfig):
    """Gaps in texts, which a model of fill-in-the-middle fills."""

    continuation_delimiter: str = key("", "Text between what comes before a gap and the gap.")
    strip_dataset: bool = key(False, "Take blanks from both ends of an example's texts.")
    prefix_key: str = key("prefix", "Key of the text before the gap.", pattern=TEXT)
    suffix_key: str = key("suffix", "Key of the text behind it.", pattern=TEXT)
    answer_key: str = key("middle", "Key of the text that was there.", pattern=TEXT)
    text_key: str = key("text", "Key of a whole text, from which a line is taken, if no answer is there.", pattern=TEXT)
    fim_format: FimFormat | None = key(None, "Order of the parts in a prompt; null is that of training, or else psm.")
    fim_sentinels: list[str] | None = key(
        None,
        "Special tokens before prefix, suffix and middle; null is those of training, or usual ones.",
        length=3,
    )
    generation_kwargs: GenerationConfig = key(GenerationConfig, "Choice of tokens.")


class Weighting(StrEnum):
    """Weights of the benchmarks of a category."""

    equal = "EQUAL"
    sample_size = "SAMPLE_SZ"
    log_sample_size = "LOG_SAMPLE_SZ"


@dataclass
class GauntletConfig:
    """Averages of tasks."""

    categories: list[object] = key(list, "Categories.")
    weighting: Weighting = key(Weighting.equal, "Weights of the benchmarks of a category.")
    subtract_random_baseline: bool = key(True, "Subtract random_baseline from each accuracy.")
    rescale_accuracy: bool = key(True, "Then divide by what is left to 1.")
    averages: object | None = key(None, "Lists of categories by the name of their average; null averages all.")


@dataclass
class CategoryConfig:
    """Category of benchmarks."""

    name: str = key(REQUIRED, "Name of the category.", pattern=TEXT)
    benchmarks: list[object] = key(REQUIRED, "Benchmarks.")


@dataclass
class BenchmarkConfig:
    """Task of a category."""

    name: str = key(REQUIRED, "Label of the task.", pattern=TEXT)
    num_fewshot: int = key(REQUIRED, "Number of solved examples.", ge=0)
    random_baseline: float = key(0.0, "Accuracy by chance.", ge=0, lt=1)
