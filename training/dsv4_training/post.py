"""A recipe of post-training: specialists, each tuned and then rewarded on its own ground, and their merging.

Owns the keys and their checks; read as strictly as a recipe of training (recipe.py), whose tables it shares.  Imports
no torch.  Lengths are in tokens; a step of rewards or merging has ``prompts`` questions with ``answers`` answers each.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from . import recipe as recipes
from .recipe import BLOCK, Data, Losses, Optimiser, Recipe, RecipeError, Routing, Shape, Stage

TASKS = ("ruler", "file", "worded", "held-out", "multikey", "tracking", "code")


@dataclass(frozen=True)
class Specialist:
    """data: what it is tuned and questioned on; grounds: the held-out tasks (evaluate.py) on which it is compared;
    weight: of its divergence when all are merged; tuning: stages of its own instead of the common one."""

    name: str
    data: Data
    grounds: tuple[str, ...]
    weight: float = 1.0
    tuning: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Writing:
    """Answers that the model writes itself.

    length: of the longest prompt; answer: its tokens at most; passes: parts in which a step's answers are learnt from.
    """

    steps: int
    prompts: int
    answers: int
    length: int = 1024
    answer: int = 48
    temperature: float = 1.0
    passes: int = 4

    @property
    def room(self) -> int:
        """Positions of a prompt with its answer, in whole blocks."""
        return self.length + -(-self.answer // BLOCK) * BLOCK


@dataclass(frozen=True)
class Rewards:
    """GRPO.  updates: steps of the optimiser for each batch of answers; clip: of the ratio of probabilities; kl: weight
    of the divergence from the tuned model."""

    writing: Writing
    optimiser: Optimiser
    updates: int = 1
    clip: float = 0.2
    kl: float = 0.01


@dataclass(frozen=True)
class Student:
    writing: Writing
    optimiser: Optimiser


@dataclass(frozen=True)
class Merging:
    """On-policy distillation; the questions of a step are dealt out to the specialists in turn.

    students: learn apart from each other; the mean of their weights is the student.  start: the specialist that they
    begin as (what takes a new skill to learn is not learnt from few answers); empty: the base.
    """

    students: tuple[Student, ...]
    start: str = ""

    def named(self) -> dict[str, Student]:
        return {f"student-{number}": student for number, student in enumerate(self.students, 1)}


@dataclass(frozen=True)
class Comparison:
    """Held-out questions of every ground and length, and how many points the student may be behind."""

    questions: int = 200
    lengths: tuple[int, ...] = (1024, 2048)
    points: float = 2.0


@dataclass(frozen=True)
class PostRecipe:
    """gpu: whether it asks for one.  model: that of the checkpoint it starts from."""

    name: str
    seed: int
    gpu: bool
    tuning: Stage
    tuning_optimiser: Optimiser
    rewards: Rewards
    merging: Merging
    specialists: tuple[Specialist, ...]
    comparison: Comparison = field(default_factory=Comparison)
    model: Shape = field(default_factory=Shape)
    losses: Losses = field(default_factory=Losses)
    routing: Routing = field(default_factory=Routing)

    def tuned(self, specialist: Specialist) -> Recipe:
        """The supervised part, as training knows it."""
        return Recipe(
            f"{self.name}-{specialist.name}", self.seed, self.gpu, specialist.tuning or (self.tuning,), self.model,
            self.tuning_optimiser, self.losses, self.routing, specialist.data,
        )  # fmt: skip


def load(path: Path) -> PostRecipe:
    """Raises RecipeError for what cannot be read or followed."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "One that ships: recipes/post/tiny.toml."
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "See recipes/post/tiny.toml for the form."
        raise RecipeError(f"the recipe {path} is not TOML: {error}", hint) from error
    recipe: PostRecipe = recipes.read(PostRecipe, table, "")
    check(recipe)
    return recipe


def check(recipe: PostRecipe) -> None:
    """Raises RecipeError for values that no run can follow."""

    def need(fine: bool, message: str, hint: str) -> None:
        if not fine:
            raise RecipeError(message, hint)

    names = [s.name for s in recipe.specialists]
    need(
        len(names) >= 2 and len(set(names)) == len(names),
        "merging needs two specialists or more, each with a name of its own",
        "Give them as [[specialists]].",
    )
    need(
        recipe.merging.start in ("", *names),
        f"merging.start is {recipe.merging.start!r}",
        f"One of {', '.join(names)}, or nothing for the base.",
    )
    taken = {"student", *recipe.merging.named()} & set(names)
    need(not taken, f'a specialist is named "{min(taken, default="")}"', "That is what they are merged into.")
    for specialist in recipe.specialists:
        unknown = [name for name in specialist.grounds if name not in TASKS]
        need(
            bool(specialist.grounds) and not unknown,
            f"specialist {specialist.name!r}: grounds {', '.join(unknown) or 'are missing'}",
            f"Some of {', '.join(TASKS)}.",
        )
        need(specialist.weight > 0, f"specialist {specialist.name!r}: weight {specialist.weight}", "More than 0.")
        recipes.check(recipe.tuned(specialist))
    students = {name: student.writing for name, student in recipe.merging.named().items()}
    need(bool(students), "merging makes no student", "Give at least one as [[merging.students]].")
    for name, writing in {"rewards": recipe.rewards.writing, **students}.items():
        need(
            writing.length > 0 and writing.length % BLOCK == 0,
            f"{name}: length {writing.length} is not a multiple of {BLOCK}",
            "Prompts are read in whole blocks.",
        )
        many = writing.prompts * writing.answers
        need(
            min(writing.steps, many, writing.answer, writing.passes) > 0 and many % max(1, writing.passes) == 0,
            f"{name}: {many} answers a step cannot be learnt from in {writing.passes} passes",
            "prompts * answers must be a multiple of passes, and all of them positive.",
        )
        need(writing.temperature > 0, f"{name}: temperature {writing.temperature}", "More than 0: answers are drawn.")
    need(
        recipe.rewards.writing.answers > 1,
        "rewards: one answer to a question has none to be compared with",
        "Set rewards.writing.answers to 8 or so.",
    )
    need(recipe.rewards.updates > 0 and 0 < recipe.rewards.clip < 1, "rewards: updates or clip", "1 and 0.2, or so.")
    for name, writing in students.items():
        need(
            writing.prompts % len(names) == 0 and writing.passes % len(names) == 0,
            f"{name}: {writing.prompts} prompts in {writing.passes} passes cannot be dealt out to {len(names)} "
            "specialists",
            "Multiples of their number.",
        )
    need(all(n > 255 for n in recipe.comparison.lengths), "comparison.lengths", "Tokens, from 256 on.")
