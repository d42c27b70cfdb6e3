"""One-line messages for what OmegaConf says about a value that a key cannot have."""

import re

from sasrec_lab.errors import did_you_mean

_KINDS = {  # what OmegaConf says about a value of the wrong type -> the rule
    r"Value '(.*?)' of type '\w+' could not be converted to Integer": "an integer",
    r"Value '(.*?)' of type '\w+' could not be converted to Float": "a number",
    r"Value '(.*?)' is not a valid bool": "true or false",
    r"Cannot convert '\w+' to string: '(.*?)'": "a text",
}
_NOT_A_SECTION = (
    r"Invalid type assigned: \w+ is not a subclass of|Cannot assign \w+ to Dict"
    r"|Cannot merge Dict|Cannot merge incompatible container types"  # OmegaConf 2.3, 2.4
)


def wrong_value(text: str, section: str = "") -> str | None:
    """Return the message on a value of the wrong type, or that is not one of a key's choices.

    `section` comes before the key that the text names: a part's options are checked for themselves.
    """
    named = full_key(text)
    if named is None:
        return None
    key = section + named[1]
    if found := re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text, re.S):
        choices = found[2].split(", ")
        return f"{key}={found[1]} is not one of {', '.join(choices)}{did_you_mean(found[1], choices)}"
    for pattern, kind in _KINDS.items():
        if found := re.search(pattern, text, re.S):
            return f"{key}={found[1]} must be {kind}"
    if re.search(r"field '.*' is not Optional|Incompatible value 'None' for field", text):
        return f"{key}=null must have a value; set it, or omit {key}"
    if re.search(r"Invalid value assigned: \w+ is not a ListConfig", text):
        return f"{key} must be a list; write {key}=[...]"
    if re.search(_NOT_A_SECTION, text):
        return f"{key} is a section; set its keys, as in {key}.<key>=<value>"
    return None


def full_key(text: str) -> re.Match[str] | None:
    """Return the match whose first group is the dotted key that the text is about."""
    return re.search(r"full_key: (\S+)", text)
