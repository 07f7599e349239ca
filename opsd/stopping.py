"""Stop strings: after which token does the text of a response contain one?"""

from __future__ import annotations

from typing import Any

_PARTIAL = "\ufffd"  # what a tokenizer decodes bytes to that are not yet, or never will be, a character


class StopStrings:
    """Finds stop strings in decoded text, special tokens left out, without decoding whole responses.

    Exact means: as if the whole response were decoded after every token. A stop string can span tokens, end inside
    one, or be made of bytes. It is looked for in the text of the last few tokens; a find is confirmed in the whole.
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]):
        self.strings = strings
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        # A character takes at most its bytes in tokens. Twice that, because a tokenizer that cleans up spaces may drop
        # every second character; one more, because some drop the space a text begins with.
        self._reach = 2 * max((len(string.encode()) for string in strings), default=0) + 1

    def first(
        self,
        tokens: list[int],  # the response so far
        checked: int,  # its first tokens that are known not to contain a stop string
    ) -> int | None:
        """The number of tokens after which the text first contains a stop string, or None."""
        if not self.strings:
            return None
        for length in range(checked + 1, len(tokens) + 1):
            start = self._start(tokens, length - 1)
            if self._in(tokens[start:length]) and self._in(tokens[:length]):
                return length
        return None

    def _in(self, tokens: list[int]) -> bool:
        text = self._text(tokens)
        return any(string in text for string in self.strings)

    def _start(self, tokens: list[int], last: int) -> int:
        """Where to begin decoding, so that a string that ends in token `last` is seen whole."""
        reach, start = self._reach, last
        # Not between the bytes of a character either: some tokenizers would then make nothing of all that follow.
        while start > 0 and (reach > 0 or _PARTIAL in self._piece(tokens[start])):
            start -= 1
            reach -= len(self._piece(tokens[start]))
        return start

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._text([token])
        return self._pieces[token]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
