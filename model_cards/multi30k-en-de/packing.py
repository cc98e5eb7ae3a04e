"""Packed rows: several documents in one row, where an LSTM starts each document from a zero state.

Shape suffixes: B rows, S positions of a row, R real positions of all rows, N lanes, L positions of the longest
document.
"""

import heapq
from typing import NamedTuple

import torch


class DocumentLanes(NamedTuple):
    """The documents of packed rows, arranged in parallel lanes so that an LSTM needs as few steps as possible.

    A lane holds one or more consecutive documents, and is as long as the longest document.

    gather_NL: (N, L) int64, the place in the flattened rows (B * S) of each position of a lane.
    mask_NL: (N, L) bool, False for positions that fill up a lane; None if all positions are used.
    starts_NL: (N, L) bool, True where a document begins after another one; None if every lane has one document.
    place_BS: (B, S) int64, the place in the flattened lanes (N * L) of each position of a row.
    lengths_N: (N,) int64 on the CPU, the number of used positions of each lane; None with `starts_NL`.
    """

    gather_NL: torch.Tensor
    mask_NL: torch.Tensor | None
    starts_NL: torch.Tensor | None
    place_BS: torch.Tensor
    lengths_N: torch.Tensor | None = None

    def to_lanes(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (N, L, D)."""
        return x.flatten(0, 1).index_select(0, self.gather_NL.flatten()).view(*self.gather_NL.shape, -1)

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, D) -> (B, S, D); the values at padding are meaningless."""
        return x.flatten(0, 1).index_select(0, self.place_BS.flatten()).view(*self.place_BS.shape, -1)


def document_starts(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    mask_BS: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return where a new document begins inside a row, from any of the three formats of the library's collators.

    Args:
        shape: (B, S) of the rows.
        position_ids: (B, S) or (1, S). A document begins where they do not increase, ignoring padding.
        seq_idx: (B, S), the index of each position's document.
        cu_seq_lens: (documents + 1,), the start of each document in the single row, and the end of the last one.
        mask_BS: (B, S), 0 for padding, whose positions are ignored; None without padding.

    Returns:
        (B, S) bool, always False at a row's first position; None if every row is one document, as always for S = 1.

    Raises:
        ValueError: a tensor has the wrong shape.
    """
    if shape[1] < 2:
        return None
    found = []
    for name, ids in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if ids is None:
            continue
        if ids.dim() != 2 or ids.shape[0] not in (1, shape[0]) or ids.shape[1] != shape[1]:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected {tuple(shape)}")
        if name == "position_ids":
            is_other = _do_not_rise(ids.expand(shape), mask_BS)
        else:
            is_other = ids.diff(dim=1) != 0
        found.append(torch.nn.functional.pad(is_other, (1, 0)).expand(shape))
    if cu_seq_lens is not None:
        starts = torch.as_tensor(cu_seq_lens).long()
        if shape[0] != 1 or starts.dim() != 1 or not len(starts) or int(starts[-1]) != shape[1]:
            raise ValueError(
                f"cu_seq_lens_q={starts.tolist()} must end with the length of one row, but input_ids has shape "
                f"{tuple(shape)}"
            )
        is_start = torch.zeros(shape, dtype=torch.bool, device=starts.device)
        is_start[0, starts[:-1]] = True
        is_start[:, 0] = False
        found.append(is_start)
    if not found:
        return None
    starts_BS = found[0]
    for other in found[1:]:
        starts_BS = starts_BS | other.to(starts_BS.device)
    return starts_BS if starts_BS.any() else None


def _do_not_rise(ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """Return (B, S - 1) bool: whether a real position, from the second on, does not exceed the previous real one."""
    if mask_BS is None:
        return ids_BS.diff(dim=1) <= 0
    mask_BS = mask_BS.to(ids_BS.device).bool()
    positions_BS = torch.arange(mask_BS.shape[1], device=ids_BS.device).expand_as(mask_BS)
    last_real_BS = positions_BS.masked_fill(~mask_BS, 0).cummax(dim=1).values
    has_real_before = mask_BS.cumsum(dim=1)[:, :-1] > 0
    return (ids_BS.gather(1, last_real_BS).diff(dim=1) <= 0) & mask_BS[:, 1:] & has_real_before


def lay_out(starts_BS: torch.Tensor, mask_BS: torch.Tensor | None, one_a_lane: bool) -> DocumentLanes | None:
    """Arrange documents in lanes.

    Args:
        starts_BS: the result of `document_starts`.
        mask_BS: (B, S) bool, False for padding, which does not belong to a document; None without padding.
        one_a_lane: whether every document gets a separate lane, for a kernel that cannot restart within a lane.
            Otherwise short documents share lanes, so that they do not add cost beside a long one.

    Returns:
        the lanes; None if every row has at most one document, as with left padding.
    """
    device, (rows, length) = starts_BS.device, starts_BS.shape
    document_BS = starts_BS.long().cumsum(dim=1) + torch.arange(rows, device=device)[:, None] * (length + 1)
    document_R, real_R = document_BS.flatten(), torch.arange(rows * length, device=device)
    if mask_BS is not None:
        real_R = mask_BS.to(device).flatten().nonzero()[:, 0]
        document_R = document_R[real_R]
    document_R, lengths = document_R.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    num_documents_of_rows = len(lengths) - (rows if mask_BS is None else int(mask_BS.any(dim=1).sum()))
    if num_documents_of_rows <= 0:
        return None
    longest = int(lengths.max())
    numbers = lengths.tolist()
    lane, offset, num_lanes = _fill_lanes(numbers, longest, one_a_lane)

    first_N = torch.tensor(lane, device=device) * longest + torch.tensor(offset, device=device)
    within_R = torch.arange(len(document_R), device=device) - (lengths.cumsum(0) - lengths)[document_R]
    place_R = first_N[document_R] + within_R
    gather = torch.zeros(num_lanes * longest, dtype=torch.long, device=device)
    gather[place_R] = real_R
    mask = starts = None
    if len(real_R) < len(gather):
        mask = torch.zeros_like(gather, dtype=torch.bool)
        mask[place_R] = True
        mask = mask.view(num_lanes, longest)
    if any(offset):
        starts = torch.zeros_like(gather, dtype=torch.bool)
        starts[first_N] = True
        starts = starts.view(num_lanes, longest)
        starts[:, 0] = False
    place = torch.zeros(rows * length, dtype=torch.long, device=device)
    place[real_R] = place_R
    lengths_N = None if starts is not None else torch.tensor(numbers)[torch.tensor(lane).argsort()]
    return DocumentLanes(gather.view(num_lanes, longest), mask, starts, place.view(rows, length), lengths_N)


def _fill_lanes(lengths: list[int], longest: int, one_a_lane: bool) -> tuple[list[int], list[int], int]:
    """Return each document's lane, its offset, and the number of lanes; the longest go first, to the emptiest lane."""
    lane, offset = [0] * len(lengths), [0] * len(lengths)
    rooms: list[tuple[int, int]] = []  # (-room left, lane)
    num_lanes = 0
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[document]
        if not one_a_lane and rooms and -rooms[0][0] >= length:
            room, number = -rooms[0][0], rooms[0][1]
            heapq.heapreplace(rooms, (length - room, number))
        else:
            room, number, num_lanes = longest, num_lanes, num_lanes + 1
            heapq.heappush(rooms, (length - room, number))
        lane[document], offset[document] = number, longest - room
    return lane, offset, num_lanes
