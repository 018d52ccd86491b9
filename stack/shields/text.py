"""Texts as a reader sees them: without the tricks by which a text looks alike and reads otherwise to a model.

Shields judge what `unmasked` gives. What the model is asked is left as it was sent.
"""

import re
import unicodedata
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+")
# Variation selectors, which choose how the character before them is drawn, and fillers, which are letters that are
# drawn as nothing. What else has no width is of the category Cf.
_INVISIBLE = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef\u115f\u1160\u3164\uffa0\u034f\u17b4\u17b5]")
# ASCII that is drawn as nothing, and that models read all the same.
_TAGS = {0xE0000 + code: code for code in range(0x20, 0x7F)}
_TAG = re.compile("[\U000e0020-\U000e007e]")


def unmasked(text: str) -> str:
    """A text in Unicode's form NFKC without invisible characters, in which homoglyphs are the letters they imitate.

    What tag characters (U+E0020 to U+E007E) say is a line of its own at the end. Half of a character (an unpaired
    surrogate) becomes U+FFFD. Homoglyphs are Unicode's confusable characters (UTS #39). They are read as Latin letters
    in words of which every letter looks like a Latin one: other scripts stay.
    """
    hidden = "".join(_TAG.findall(text)).translate(_TAGS)
    seen = "".join(one for one in text if one.isspace() or unicodedata.category(one) not in ("Cf", "Cc"))
    seen += f"\n{hidden}" if hidden else ""
    if seen.isascii():
        return seen
    whole = seen.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    normal = unicodedata.normalize("NFKC", _INVISIBLE.sub("", whole))
    return _WORD.sub(lambda word: _in_latin(word[0]), normal)


def _in_latin(word: str) -> str:
    if word.isascii():
        return word
    letters = [_latin_twin(letter) for letter in word]
    return "".join(letters) if all(letters) else word


@lru_cache(2**14)
def _latin_twin(letter: str) -> str:
    """The Latin letter that a letter is taken for, itself if it is one or is a digit; nothing if there is none."""
    if letter.isascii() or not letter.isalpha():
        return letter
    # Its tables take 8 MB, of which most texts need nothing.
    from confusable_homoglyphs import confusables

    found = confusables.is_confusable(letter, greedy=True, preferred_aliases=[])
    for twin in found[0]["homoglyphs"] if found else ():
        if len(twin["c"]) == 1 and twin["c"].isascii() and twin["c"].isalpha():
            # Unicode's table has one entry for all that is a vertical line.
            return "I" if twin["c"] == "l" and letter.isupper() else str(twin["c"])
    return letter if unicodedata.name(letter, "").startswith("LATIN") else ""
