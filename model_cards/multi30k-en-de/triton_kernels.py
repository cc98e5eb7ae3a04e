"""Triton kernels for the experts on a GPU: products of rows with their expert's matrix, and sums over a token's slots.

Programs never add to the same memory, so equal inputs give equal bits. Sizes do not depend on the routing, so the host
never waits for the GPU. Sums are computed in float32.

Importing this file needs the package triton. If TRITON_INTERPRET=1 is set before triton is imported, the kernels run
slowly on a CPU, for tests.

Shape suffixes: T tokens, E experts, K slots per token, R = T * K slots.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "experts_implementation='triton' needs the package triton, which is not installed (pip install triton); "
        "use 'moe_hf'"
    ) from error


@triton.jit
def rows_kernel(
    rows,
    weight,
    output,
    order,
    expert_of_tile,
    tile_ends,
    offsets,
    hidden,
    scales,
    dots,
    num_experts,
    num_slots,
    num_inputs,
    num_outputs,
    expert_stride,
    input_stride,
    output_stride,
    slots_per_token: tl.constexpr,
    gathers: tl.constexpr,
    scatters: tl.constexpr,
    epilogue: tl.constexpr,
    product_dtype: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_inputs: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """Compute output[r] = rows[r] @ weight[expert of r]. A program computes a block of outputs for a tile of rows.

    Arguments, tensors by their addresses:
    - rows: (R, num_inputs), sorted by expert; with `gathers` (T, num_inputs), by token.
    - weight: (E, num_inputs, num_outputs) in any layout, by its strides; cast to the dtype of `rows`.
    - output: (R, num_outputs), sorted by expert, or with `scatters` by slot. Unused slots are not written.
    - order: (R,), the slot of each sorted row.
    - expert_of_tile: the expert of each tile, `num_experts` for unused tiles.
    - tile_ends: (E,), the number of tiles up to and including each expert.
    - offsets: (E + 1,), the start of each expert's rows.
    - hidden: (R, num_outputs), sorted by expert: the hidden units, for epilogue "backward".
    - scales: (R,), by slot: the weights, for epilogue "backward".
    - dots: (blocks of outputs, R), by slot: <output, hidden> of each block, written by epilogue "backward".
    - num_experts: E.
    - num_slots: R.
    - num_inputs: the width of `rows`.
    - num_outputs: the width of `output`.
    - expert_stride, input_stride, output_stride: strides of `weight`.
    - slots_per_token: K.
    - gathers: whether `rows` are by token.
    - scatters: whether `output` is by slot.
    - epilogue: "none", "relu" or "backward". "backward" writes the dots, scales, and applies the derivative of ReLU.
    - product_dtype: dtype of the factors.
    - precision: precision of float32 products, "ieee" or "tf32".
    - block_rows: rows of a tile.
    - block_inputs: inputs that are summed at a time.
    - block_outputs: outputs of a program.
    """
    num_blocks = tl.cdiv(num_outputs, block_outputs)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    if expert == num_experts:
        return
    tiles_before = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    first = tl.load(offsets + expert) + (tile - tiles_before) * block_rows
    row = first.to(tl.int64) + tl.arange(0, block_rows)
    is_row = row < tl.load(offsets + expert + 1)
    slot = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
    source = slot // slots_per_token if gathers else row

    inputs = tl.arange(0, block_inputs)
    outputs = block * block_outputs + tl.arange(0, block_outputs)
    is_output = outputs < num_outputs
    row_pointers = rows + source[:, None] * num_inputs + inputs[None, :]
    weight += expert * expert_stride
    weight_pointers = weight + inputs[:, None] * input_stride + outputs[None, :] * output_stride
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    for start in range(0, num_inputs, block_inputs):
        is_input = start + inputs < num_inputs
        left = tl.load(row_pointers, mask=is_row[:, None] & is_input[None, :], other=0.0)
        right = tl.load(weight_pointers, mask=is_input[:, None] & is_output[None, :], other=0.0)
        right = right.to(left.dtype).to(product_dtype)
        total = tl.dot(left.to(product_dtype), right, total, input_precision=precision)
        row_pointers += block_inputs
        weight_pointers += block_inputs * input_stride

    is_here = is_row[:, None] & is_output[None, :]
    if epilogue == "relu":
        total = tl.where(total < 0, 0.0, total)  # NaN stays
    if epilogue == "backward":
        units = tl.load(hidden + row[:, None] * num_outputs + outputs[None, :], mask=is_here, other=0.0)
        units = units.to(tl.float32)
        dot = tl.sum(total * units, axis=1)
        tl.store(dots + block.to(tl.int64) * num_slots + slot, dot, mask=is_row)
        scale = tl.load(scales + slot, mask=is_row, other=0.0).to(tl.float32)
        total = tl.where(units > 0, total * scale[:, None], 0.0)
    target = slot if scatters else row
    pointers = output + target[:, None] * num_outputs + outputs[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=is_here)


@triton.jit
def weights_kernel(
    left,
    right,
    output,
    order,
    offsets,
    scales,
    num_left,
    num_right,
    slots_per_token: tl.constexpr,
    gathers_left: tl.constexpr,
    product_dtype: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_left: tl.constexpr,
    block_right: tl.constexpr,
):
    """Compute output[e] = left_e' @ right_e over the rows of expert e, zero without rows. A program computes a block.

    One side is by token and is gathered. The other side is sorted by expert.

    Arguments, tensors by their addresses:
    - left: (R, num_left), or with `gathers_left` (T, num_left).
    - right: (T, num_right), or with `gathers_left` (R, num_right).
    - output: (E, num_left, num_right), written completely.
    - order: (R,), the slot of each sorted row.
    - offsets: (E + 1,), the start of each expert's rows.
    - scales: (R,), by slot: the weights, for `gathers_left`.
    - num_left: the width of `left`.
    - num_right: the width of `right`.
    - slots_per_token: K.
    - gathers_left: whether `left` is by token and multiplied by `scales`; otherwise `right` is by token.
    - product_dtype: dtype of the factors.
    - precision: precision of float32 products, "ieee" or "tf32".
    - block_rows: rows that are summed at a time.
    - block_left: rows of a program's block.
    - block_right: columns of a program's block.
    """
    blocks_left, blocks_right = tl.cdiv(num_left, block_left), tl.cdiv(num_right, block_right)
    program = tl.program_id(0)
    expert = (program // (blocks_left * blocks_right)).to(tl.int64)
    lefts = program // blocks_right % blocks_left * block_left + tl.arange(0, block_left)
    rights = program % blocks_right * block_right + tl.arange(0, block_right)
    is_left, is_right = lefts < num_left, rights < num_right
    total = tl.zeros((block_left, block_right), tl.float32)
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, block_rows):
        row = (start + tl.arange(0, block_rows)).to(tl.int64)
        is_row = row < end
        slot = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
        token = slot // slots_per_token
        left_row, right_row = (token, row) if gathers_left else (row, token)
        left_pointers = left + left_row[None, :] * num_left + lefts[:, None]
        right_pointers = right + right_row[:, None] * num_right + rights[None, :]
        left_part = tl.load(left_pointers, mask=is_left[:, None] & is_row[None, :], other=0.0)
        right_part = tl.load(right_pointers, mask=is_row[:, None] & is_right[None, :], other=0.0)
        if gathers_left:
            scale = tl.load(scales + slot, mask=is_row, other=0.0).to(tl.float32)
            left_part = (left_part.to(tl.float32) * scale[None, :]).to(right_part.dtype)
        total = tl.dot(left_part.to(product_dtype), right_part.to(product_dtype), total, input_precision=precision)
    pointers = output + (expert * num_left + lefts[:, None]) * num_right + rights[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=is_left[:, None] & is_right[None, :])


@triton.jit
def combine_kernel(
    rows,
    output,
    is_used,
    scales,
    num_tokens,
    width,
    slots_per_token: tl.constexpr,
    weighs: tl.constexpr,
    block_tokens: tl.constexpr,
    block_width: tl.constexpr,
):
    """Compute output[t], the sum over the used slots of token t in order. A program computes a block of the output.

    Arguments, tensors by their addresses:
    - rows: (R, width), by slot; rows of unused slots are not read.
    - output: (T, width).
    - is_used: (R,) bool.
    - scales: (R,), the weights, for `weighs`.
    - num_tokens: T.
    - width: width of `rows`.
    - slots_per_token: K.
    - weighs: whether the sum is weighted by `scales`.
    - block_tokens: tokens of a program.
    - block_width: columns of a program.
    """
    num_blocks = tl.cdiv(width, block_width)
    token = (tl.program_id(0) // num_blocks).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    columns = tl.program_id(0) % num_blocks * block_width + tl.arange(0, block_width)
    is_token, is_column = token < num_tokens, columns < width
    total = tl.zeros((block_tokens, block_width), tl.float32)
    for k in range(slots_per_token):
        slot = token * slots_per_token + k
        counts = tl.load(is_used + slot, mask=is_token, other=0) != 0
        part = tl.load(
            rows + slot[:, None] * width + columns[None, :], mask=counts[:, None] & is_column[None, :], other=0.0
        )
        part = part.to(tl.float32)
        if weighs:
            part *= tl.load(scales + slot, mask=counts, other=0.0).to(tl.float32)[:, None]
        total += part
    pointers = output + token[:, None] * width + columns[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


IS_INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)
