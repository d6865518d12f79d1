"""What is asked of a scene, and the one right answer to each question, both read off the description."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgevlm.evaluation.scenes.dice import Dice
from edgevlm.evaluation.scenes.world import COLORS, SHAPES, TEXTURES, Scene, SceneObject

KINDS = ("exists", "count", "color", "position", "size", "read")
NUM_QUESTIONS = 9  # of each scene at most, and at most two of a kind
NOUN_WEIGHTS = (3, 1, 1, 1)  # of the four lists that ``_nouns`` gives
CAPTION_KIND = "caption"  # asked to be described, not scored by exact match
CAPTION_PROMPT = "Describe the picture."

# Counts are chosen by their answer, rarer ones more eagerly: otherwise most answers would be 0 or 1.
COUNT_WEIGHTS = {0: 0.6, 1: 0.6, 2: 0.9, 3: 1.8, 4: 3.0, 5: 4.0, 6: 5.0}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its only right answer; ``kind`` is one of ``KINDS``, or "caption"."""

    kind: str
    prompt: str
    answer: str


def questions(scene: Scene) -> tuple[Question, ...]:
    """All that is asked of this scene, in random order.

    One question of each kind that the scene allows, then second ones, of scarce kinds first.
    """
    dice = Dice(f"questions/{scene.seed}/{scene.index}")
    by_kind = {kind: ask(scene, dice) for kind, ask in ASK.items()}
    scarce_first = ["read", "size", *dice.shuffled(["position", "color", "count", "exists"])]
    firsts = [by_kind[kind][0] for kind in KINDS if by_kind[kind]]
    seconds = [by_kind[kind][1] for kind in scarce_first if len(by_kind[kind]) > 1]
    return tuple(dice.shuffled([*firsts, *seconds][:NUM_QUESTIONS]))


def caption(scene: Scene) -> str:
    """One sentence a row, naming its objects from left to right and where they stand."""
    sentences = []
    for row in range(scene.num_rows):
        items = [item for item in scene.objects if item.row == row]
        if items:
            verb = "is" if len(items) == 1 else "are"
            listed = _listed([_described(item) for item in items])
            sentences.append(f"{listed[0].upper()}{listed[1:]} {verb} {_whereabouts(scene, row)}.")
    return " ".join(sentences)


# Kinds


def _ask_exists(scene: Scene, dice: Dice) -> list[Question]:
    """Two questions, one answered yes and one no."""
    asked = []
    for answer in dice.shuffled(("yes", "no")):
        forms = _nouns(scene, present=answer == "yes")
        weights = [weight if nouns else 0 for weight, nouns in zip(NOUN_WEIGHTS, forms, strict=True)]
        noun = dice.pick(dice.weighted(forms, weights))
        wording = dice.pick(("Is there {}?", "Do you see {}?", "Can you see {}?"))
        asked.append(Question(kind="exists", prompt=wording.format(_with_article(noun)), answer=answer))
    return asked


def _nouns(scene: Scene, present: bool) -> list[list[str]]:
    """Names of what is there, or of what is missing though it may seem to be there.

    Four lists: colored shapes, shapes, colors, textured shapes.  Signs are too common to be asked for by
    shape alone, and never textured.
    """
    shapes = _unique(item.shape for item in scene.objects)
    colors = _unique(item.color for item in scene.objects)
    present_shapes = [shape for shape in shapes if shape != "sign"]
    names = [item.name for item in scene.objects]
    textured = _unique(f"{item.texture} {item.shape}" for item in scene.objects if item.texture != "plain")
    if present:
        return [names, present_shapes, [f"{color} object" for color in colors], textured]
    swapped = [f"{color} {shape}" for color in colors for shape in shapes]
    recolored = [f"{color} {shape}" for color in COLORS for shape in shapes]
    return [
        _without(swapped, names) or _without(recolored, names),
        _without(SHAPES[:-1], shapes),
        [f"{color} object" for color in _without(COLORS, colors)],
        _without([f"{texture} {shape}" for texture in TEXTURES[1:] for shape in present_shapes], textured),
    ]


def _ask_count(scene: Scene, dice: Dice) -> list[Question]:
    """Two questions with different answers."""
    nouns: dict[int, list[str]] = {len(scene.objects): ["objects"]}
    for noun, number in _counts(scene):
        nouns.setdefault(number, []).append(noun)
    asked = []
    for _ in range(2):
        numbers = sorted(nouns)
        number = dice.weighted(numbers, [COUNT_WEIGHTS[number] for number in numbers])
        noun = dice.pick(nouns.pop(number))
        wording = dice.pick(("How many {} are there?", "How many {} do you see?", "Count the {}."))
        asked.append(Question(kind="count", prompt=wording.format(noun), answer=str(number)))
    return asked


def _counts(scene: Scene) -> list[tuple[str, int]]:
    """How often each shape, color and texture occurs."""
    items = scene.objects
    return [
        *((_plural(shape), sum(item.shape == shape for item in items)) for shape in SHAPES),
        *((f"{color} objects", sum(item.color == color for item in items)) for color in COLORS),
        *((f"{texture} objects", sum(item.texture == texture for item in items)) for texture in TEXTURES[1:]),
    ]


def _ask_color(scene: Scene, dice: Dice) -> list[Question]:
    """Up to two questions, about objects that their shape, or size and shape, single out."""
    asked = []
    for item in dice.shuffled(scene.objects):
        alike = [other for other in scene.objects if other.shape == item.shape]
        if len(alike) == 1:
            noun = item.shape
        elif item.shape != "sign" and sum(other.size == item.size for other in alike) == 1:
            noun = f"{item.size} {item.shape}"
        else:
            continue
        wording = dice.pick(("What color is the {}?", "Which color is the {}?", "Name the color of the {}."))
        asked.append(Question(kind="color", prompt=wording.format(noun), answer=item.color))
    return asked[:2]


def _ask_position(scene: Scene, dice: Dice) -> list[Question]:
    """Up to two questions about neighbours."""
    asked = []
    for relation, of, answer in dice.shuffled(list(_neighbours(scene)))[:2]:
        wordings = ("What is {} the {}?", "Which object is {} the {}?", "Name the object {} the {}.")
        wording = dice.pick(wordings)
        asked.append(Question(kind="position", prompt=wording.format(relation, of.name), answer=answer.name))
    return asked


def _neighbours(scene: Scene) -> Iterable[tuple[str, SceneObject, SceneObject]]:
    """(relation, of, answer): next in the same row, and on a shelf the one object over or under."""
    for item, following in pairwise(scene.objects):
        if item.row == following.row:
            yield "left of", following, item
            yield "right of", item, following
    if scene.surface == "shelf":
        for item in scene.objects:
            other = _in_column(item, [other for other in scene.objects if other.row != item.row])
            if other:
                yield "below" if item.row == 0 else "above", item, other


def _in_column(item: SceneObject, others: Sequence[SceneObject]) -> SceneObject | None:
    """The one of ``others`` clearly in line with ``item``, if there is one.

    They share most of the narrower one's width, and ``item`` shares next to nothing with the rest.
    """
    shares = sorted(((_shared_width(item, other), i) for i, other in enumerate(others)), reverse=True)
    if shares and shares[0][0] >= 0.6 and all(share <= 0.15 for share, _ in shares[1:]):
        return others[shares[0][1]]
    return None


def _shared_width(one: SceneObject, two: SceneObject) -> float:
    """How much of the narrower object's width both cover."""
    shared = min(one.box[2], two.box[2]) - max(one.box[0], two.box[0])
    return max(0.0, shared) / min(one.box[2] - one.box[0], two.box[2] - two.box[0])


def _ask_size(scene: Scene, dice: Dice) -> list[Question]:
    """Up to two questions, each about one small and one large object."""
    items = [item for item in scene.objects if item.shape != "sign"]
    all_large, all_small = ([item for item in items if item.size == size] for size in ("large", "small"))
    pairs = [(large, small) for large in all_large for small in all_small]
    asked = []
    for large, small in dice.shuffled(pairs)[:2]:
        first, second = dice.shuffled((large, small))
        word = dice.pick(("larger", "bigger", "smaller", "smaller"))
        answer = small if word == "smaller" else large
        wording = dice.pick(("Which is {}, the {} or the {}?", "Which object is {}, the {} or the {}?"))
        prompt = wording.format(word, first.name, second.name)
        asked.append(Question(kind="size", prompt=prompt, answer=answer.name))
    return asked


def _ask_read(scene: Scene, dice: Dice) -> list[Question]:
    """Up to two questions about printed text."""
    num_signs = sum(item.shape == "sign" for item in scene.objects)
    asked = []
    for item in dice.shuffled([item for item in scene.objects if item.text])[:2]:
        noun = "sign" if item.shape == "sign" and num_signs == 1 and dice.chance(0.7) else item.name
        what = "number" if item.text.isdigit() else "word"
        wordings = [f"What {what} is on the {noun}?", f"Read the {what} on the {noun}."]
        if item.shape == "sign":
            wordings += [f"What does the {noun} say?", f"Read the {noun}."]
        asked.append(Question(kind="read", prompt=dice.pick(wordings), answer=item.text))
    return asked


ASK: dict[str, Callable[[Scene, Dice], list[Question]]] = {
    "exists": _ask_exists,
    "count": _ask_count,
    "color": _ask_color,
    "position": _ask_position,
    "size": _ask_size,
    "read": _ask_read,
}


# Words


def _described(item: SceneObject) -> str:
    if not item.text:
        return _with_article(item.name)
    return f"{_with_article(item.name)} {'saying' if item.shape == 'sign' else 'with'} {item.text}"


def _whereabouts(scene: Scene, row: int) -> str:
    if scene.surface == "shelf":
        return ("on the upper shelf", "on the lower shelf")[row]
    if scene.num_rows == 1:
        return f"on the {scene.surface}"
    return (f"at the back of the {scene.surface}", f"at the front of the {scene.surface}")[row]


def _listed(nouns: Sequence[str]) -> str:
    *firsts, last = nouns
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _without(items: Iterable[str], unwanted: Sequence[str]) -> list[str]:
    return [item for item in items if item not in unwanted]
