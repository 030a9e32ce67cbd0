"""The media and boxes that a row lists, handed out mark by mark: `<image>`, `<ImageHere>`, `<video>`, `<bbox>`, ….

A mark is a mark in user turns only; in an answer it is text. Boxes (ms-swift's `objects`) have marks in both. Files of
pseudo-text (`embedding`) have `<embedding>`, or a reserved token that is repeated once for each row of the file; in
rows that list none, that token is text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from vlmtune.data.media.embedding import split_name
from vlmtune.data.rows.formats import Row, cut, entry, kind_of, shown
from vlmtune.data.sample import Box, BoxUnit, Image, MediaRef, Part, PseudoText, Role, Text, Video
from vlmtune.errors import DataError

Locate = Callable[[str], MediaRef]
"""A path or URI of a row -> where its bytes are (the path of a folder ends with a slash); raises DataError."""

MARK = re.compile(r"<image>|<ImageHere>|<video>")
_ANY_MARK = re.compile(r"<image>|<ImageHere>|<video>|<embedding>|<bbox>|<ref-object>")
_BOX_MARK = re.compile(r"<bbox>|<ref-object>")
_QWEN_PICTURE = re.compile(r"<img>[^<>]+\.(?:jpe?g|png|webp|bmp|gif)</img>", re.IGNORECASE)
_UNITS: Mapping[str, tuple[BoxUnit, float]] = {
    "real": ("pixels", math.inf),
    "norm1000": ("thousand", 1000),
    "norm1": ("unit", 1),
}
MEDIA_KEYS = ("image", "images", "video", "videos", "embedding", "embeddings", "objects")

PART_KEYS = frozenset({"type", "text", "image", "image_url", "video", "video_url", "url", "path"})
"""What is read of a part of an OpenAI content."""

_Kind = Literal["image", "video", "embedding"]


class Media:
    """What a row lists beside its text, and how much of it has been placed.

    Args:
        reserved: the token whose runs are places of pseudo-text, in a row that lists some; None: `<embedding>` alone.
    """

    def __init__(self, row: Row, locate: Locate, *, reserved: str | None = None) -> None:
        self._locate = locate
        kinds: tuple[_Kind, ...] = ("image", "video", "embedding")
        self._listed: dict[_Kind, list[object]] = {kind: _listed(row, kind) for kind in kinds}
        self._marks: dict[_Kind, int] = dict.fromkeys(kinds, 0)
        self._reserved = reserved if self._listed["embedding"] else None
        self._user_marks = _ANY_MARK
        if self._reserved is not None:
            self._user_marks = re.compile(f"{_ANY_MARK.pattern}|(?:{re.escape(self._reserved)})+")
        self._marks_in_answers = 0
        self._objects = _Objects(row.get("objects"))
        # Tools that feed a video as a row of pictures write <image> where it stands.
        self._image_means: _Kind = "image"
        self._image_tag = "<image>"

    def look_at(self, texts: Sequence[str], *, in_front: bool) -> list[Part]:
        """Takes note of all user texts of the row; returns the media that stand in front of them, if `in_front`."""
        marks = {mark for text in texts for mark in MARK.findall(text)}
        if not self._listed["image"] and any("</img>" in text and _QWEN_PICTURE.search(text) for text in texts):
            raise DataError(
                "a turn names its picture inside the text, as <img>path</img> of the first Qwen-VL",
                expected="the path in `image` or `images`, and <image> at its place in the text",
                remedy="Convert the rows; as they stand the picture would be trained as words.",
            )
        if self._listed["video"] and not self._listed["image"] and "<video>" not in marks:
            self._image_means = "video"
        if "<ImageHere>" in marks and "<image>" not in marks:
            self._image_tag = "<ImageHere>"
        parts: list[Part] = []
        if in_front and not marks:
            for kind in ("image", "video"):
                for _ in self._listed[kind]:
                    parts += [*self.next(kind), Text("\n")]
        return parts

    def split(self, text: str, role: Role) -> list[Part]:
        """The parts of a string; not joined yet."""
        if role == "system" or ("<" not in text and self._reserved is None):
            return [Text(text)] if text else []
        if role == "assistant":
            self._marks_in_answers += len(MARK.findall(text))
        parts: list[Part] = []
        start = 0
        for mark in (self._user_marks if role == "user" else _BOX_MARK).finditer(text):
            parts.append(Text(text[start : mark.start()]))
            parts.extend(self._behind(mark.group()))
            start = mark.end()
        parts.append(Text(text[start:]))
        return parts

    def _behind(self, mark: str) -> list[Part]:
        if mark == "<bbox>":
            return self._objects.next_box()
        if mark == "<ref-object>":
            return self._objects.next_name()
        if self._reserved is not None and mark.startswith(self._reserved):
            run = len(mark) // len(self._reserved)
            return [replace(part, run=run) for part in self.next("embedding") if isinstance(part, PseudoText)]
        if mark == "<embedding>":
            return self.next("embedding")
        return self.next("video" if mark == "<video>" else self._image_means)

    def next(self, kind: _Kind) -> list[Part]:
        """The next one listed; none when the list is exhausted, which `all_placed` reports with both counts."""
        self._marks[kind] += 1
        number, listed = self._marks[kind], self._listed[kind]
        return [self.part(kind, listed[number - 1], f"{kind} {number}")] if number <= len(listed) else []

    def has(self, kind: _Kind) -> bool:
        return bool(self._listed[kind])

    def part(self, kind: _Kind, value: object, place: str) -> Part:
        """A medium from what a row says of it: a path or URI, an object with one, or its bytes."""
        name = value
        if isinstance(value, dict):
            inside = value.get("bytes")
            if isinstance(inside, bytes) and inside:
                name = MediaRef(path=cut(str(value.get("path") or place), 80), inline=inside)
            else:
                name = next((value[key] for key in ("path", "url", kind) if isinstance(value.get(key), str)), value)
        key = None
        if kind == "embedding" and isinstance(name, str):
            name, key = split_name(name)
        if isinstance(name, str):
            name = self._locate(name)
        if not isinstance(name, MediaRef):
            raise DataError(f"{place} is {kind_of(value)}", expected="a path, a list of paths, or null")
        if kind == "video":
            return Video(name)
        if name.inline is None and name.path.endswith("/"):
            thing = "a .pt or .safetensors file" if kind == "embedding" else "a picture file"
            raise DataError(f"{name.path} is a folder", expected=thing)
        return PseudoText(replace(name, key=key)) if kind == "embedding" else Image(name)

    def boxes_placed(self) -> None:
        """
        Raises:
            DataError: boxes or names without marks, marks without them, a box on a picture that is not there.
        """
        self._objects.all_placed(len(self._listed["image"]))

    def all_placed(self) -> None:
        """
        Raises:
            DataError: media without marks, or marks without them.
        """
        for kind, listed in self._listed.items():
            self._compare(kind, len(listed))

    def _compare(self, kind: _Kind, listed: int) -> None:
        marks = self._marks[kind]
        if marks == listed:
            return
        tag = self._image_tag if self._image_means == kind else f"<{kind}>"
        if kind == "embedding" and self._reserved is not None:
            raise self._misplaced_embeddings(marks, listed, self._reserved)
        if marks > listed:
            remedy = f"Add the missing path{_s(marks - listed)}, or remove a mark."
        else:
            thing = {"image": "picture", "embedding": "file"}.get(kind, kind)
            remedy = f"Put {tag} into a user turn where each {thing} belongs, or remove a path."
            if kind != "embedding" and not any(self._marks.values()):
                remedy += " `unmarked_media: front` at the source puts media without marks in front of the question."
        if self._marks_in_answers:
            remedy += f" (The {self._marks_in_answers} in the answers count as text.)"
        raise DataError(f"{marks} {tag} mark{_s(marks)} but {listed} {kind}{_s(listed)}", remedy=remedy)

    @staticmethod
    def _misplaced_embeddings(marks: int, listed: int, reserved: str) -> DataError:
        return DataError(
            f"the questions hold {marks} place{_s(marks)} for pseudo-text, but the row lists {listed} embedding"
            f"{_s(listed)}",
            expected=f"for each of them <embedding>, or {reserved} as often as its file has rows",
            remedy="Put one of the two into a user turn where each file belongs; runs of the token that touch are one.",
        )


def _listed(row: Row, kind: _Kind) -> list[object]:
    """What the row's `image` or `images` lists, say; entries are strings, objects or references."""
    given = [key for key in (kind, f"{kind}s") if row.get(key) not in (None, "", [])]
    if len(given) == 2:
        raise DataError(f"the row has both `{kind}` and `{kind}s`", expected="one of them")
    if not given:
        return []
    value = row[given[0]]
    entries = value if isinstance(value, list) else [value]
    for i, one in enumerate(entries):
        if isinstance(one, str | MediaRef) or (isinstance(one, dict) and _is_medium(one, kind)):
            continue
        which = f"entry {i + 1} of `{given[0]}`" if isinstance(value, list) else f"`{given[0]}`"
        raise DataError(f"{which} is {kind_of(one)}", expected="a path, a list of paths, or null")
    return entries


def _is_medium(value: Mapping[str, object], kind: str) -> bool:
    inside = value.get("bytes")
    return (isinstance(inside, bytes) and bool(inside)) or any(
        isinstance(value.get(key), str) for key in ("path", "url", kind)
    )


class _Objects:
    """ms-swift's ``{"ref": [names], "bbox": [[x1, y1, x2, y2], …], "bbox_type": "real", "image_id": [0, …]}``."""

    def __init__(self, value: object) -> None:
        if value in (None, "", []):
            value = {}
        if not isinstance(value, dict):
            raise DataError(f"`objects` is {kind_of(value)}", expected='{"ref": [names], "bbox": [[…]]}')
        self._names = _list_in(value, "ref")
        self._boxes = _list_in(value, "bbox")
        self._pictures = _list_in(value, "image_id")
        self._unit, self._most = _UNITS["real"]
        given = value.get("bbox_type")
        if given is not None:
            if not isinstance(given, str) or given not in _UNITS:
                raise DataError(f"`bbox_type` is {shown(given)}", expected=f"one of {', '.join(_UNITS)}")
            self._unit, self._most = _UNITS[given]
        if self._pictures and len(self._pictures) != len(self._boxes):
            raise DataError(
                f"`image_id` has {len(self._pictures)} entries, but `bbox` has {len(self._boxes)}",
                expected="the number of its picture for every box",
            )
        self._num_boxes = self._num_names = 0

    def next_box(self) -> list[Part]:
        i, self._num_boxes = self._num_boxes, self._num_boxes + 1
        if i >= len(self._boxes):
            return []
        picture = self._pictures[i] if self._pictures else 0
        if not isinstance(picture, int) or isinstance(picture, bool) or picture < 0:
            raise DataError(f"entry {i + 1} of `image_id` is {kind_of(picture)}", expected="a number from 0")
        return [Box(self._corners(self._boxes[i], f"box {i + 1}"), picture=picture, unit=self._unit)]

    def _corners(self, box: object, place: str) -> tuple[float, float, float, float]:
        entries = box if isinstance(box, list) else []
        numbers = [number for number in entries if isinstance(number, int | float) and not isinstance(number, bool)]
        if len(entries) != 4 or len(numbers) != 4:
            found = f"has {len(numbers)} numbers" if isinstance(box, list) else f"is {kind_of(box)}"
            raise DataError(f"{place} {found}", expected="four numbers, [left, top, right, bottom]")
        try:
            x1, y1, x2, y2 = map(float, numbers)
        except OverflowError:
            raise DataError(f"{place} has a number that is too large", expected="four numbers") from None
        if not (0 <= x1 <= x2 <= self._most and 0 <= y1 <= y2 <= self._most) or math.isinf(max(x2, y2)):
            most = "" if math.isinf(self._most) else f", at most {self._most:g}"
            raise DataError(
                f"{place} is [{x1:g}, {y1:g}, {x2:g}, {y2:g}]",
                expected=f"[left, top, right, bottom], from 0{most}, with left ≤ right and top ≤ bottom",
                remedy="Look whether `bbox_type` is right." if most else "",
            )
        return x1, y1, x2, y2

    def next_name(self) -> list[Part]:
        i, self._num_names = self._num_names, self._num_names + 1
        if i >= len(self._names):
            return []
        name = self._names[i]
        if not isinstance(name, str):
            raise DataError(f"entry {i + 1} of `ref` is {kind_of(name)}", expected="a string")
        return [Text(name)]

    def all_placed(self, num_images: int) -> None:
        for marks, listed, tag, key in (
            (self._num_boxes, len(self._boxes), "<bbox>", "bbox"),
            (self._num_names, len(self._names), "<ref-object>", "ref"),
        ):
            if marks != listed:
                raise DataError(
                    f"{marks} {tag} mark{_s(marks)} but {listed} in `{key}` of `objects`",
                    expected="one mark for each of them, in their order",
                )
        for i, picture in enumerate(self._pictures or [0] * len(self._boxes)):
            if isinstance(picture, int) and picture >= num_images:
                raise DataError(
                    f"box {i + 1} is on picture {picture} (counted from 0), but the row has {num_images}",
                    expected="the number of a picture of the row in `image_id`",
                )


def _list_in(value: Mapping[str, object], key: str) -> list[object]:
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise DataError(f"`{key}` of `objects` is {kind_of(found)}", expected="a list")
    return found


def joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts as one: however a row came by them, they are text like what stands beside them."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, Text):
            if not part.text:
                continue
            before = found[-1] if found else None
            if isinstance(before, Text):
                found[-1] = Text(before.text + part.text)
                continue
        found.append(part)
    return found


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def openai_part(item: object, role: Role, place: str, media: Media) -> list[Part]:
    """One part of the content of an OpenAI message."""
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str):
        raise DataError(
            f"{place} is {kind_of(item)}" if not isinstance(item, dict) else f"{place} has no `type`",
            expected='an object with a `type`: "text", "image_url", "image", "video_url" or "video"',
        )
    if kind == "text":
        text = entry(item, place, "text")
        if not isinstance(text, str):
            raise DataError(f"the text of {place} is {kind_of(text)}", expected="a string")
        return media.split(text, role)
    if kind not in ("image_url", "image", "video_url", "video"):
        raise DataError(
            f"{place} has the type {cut(kind, 40)!r}, which is not supported yet", expected="text, images and videos"
        )
    medium: _Kind = "image" if kind.startswith("image") else "video"
    thing = "picture" if medium == "image" else "video"
    if role != "user":
        raise DataError(f"{place} is a {thing} in a turn of the {role}", expected=f"{thing}s in user turns")
    source = next((item[key] for key in (f"{medium}_url", medium, "url", "path") if item.get(key) is not None), None)
    if source is None and kind == medium and media.has(medium):
        return media.next(medium)  # it stands in the row's `images`; this part only marks its place
    if isinstance(source, list):
        raise DataError(f"{place} lists frames", expected="the path of a video, or of a folder with its frames")
    if not (isinstance(source, str | MediaRef) or (isinstance(source, dict) and _is_medium(source, medium))):
        shape = f'{{"type": "{medium}_url", "{medium}_url": {{"url": "path"}}}}'
        raise DataError(f"{place} names no {thing}", expected=shape)
    return [media.part(medium, source, place)]
