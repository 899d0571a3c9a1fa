"""One function per operation; `kernel=` picks among its twins: plain PyTorch, Triton, another library's.

The Triton twin of OP lives in OP_triton.py and is imported when it is chosen: Triton does not exist on every system.

Names in the Triton files. What only one operation uses stands at the top of its file; the scan's names are below.
Tensors are passed as pointers to their first number; strides, offsets and sizes count numbers, not bytes. Upper case is
fixed when a kernel is compiled (`tl.constexpr`), all else when it runs.

    x, y, q, weight ...     the tensor that the plain twin calls so; None where it takes no part
    dx, d_x                 the gradient of x
    partial, sums           a float32 sum of each program; PyTorch adds them up, in a fixed order
    x_batch, x_clip, x_b    stride of x from one clip to the next
    x_row, x_n, x_m         ... from one token to the next
    x_frame, x_k            ... from one frame, from one head to the next
    stride_b, stride_n ...  the same of the one tensor that has strides
    n, rows                 tokens of a sequence; tokens with the padding behind them
    index                   raster row of each position of a scan order [n]; INDEXED: whether there is one
    ADD                     whether a gradient is added to what its buffer holds, instead of replacing it
    ok, inside, real, seen  masks: which of a program's numbers exist
    at, base, line, place   offsets into tensors; place also: where a token lies in its sequence
    ..._PADDED, FULL        a size rounded up to a power of two, as `tl.arange` wants; the excess is masked
    num_warps, num_stages   as in Triton

The scan (scan_triton, scan_backward_triton), in the letters of `scan`: b clips, r directions, k heads of e, g groups of
s; q is CHUNK. Names in _f or `first` belong to the direction from the first token on, in _g or `second` to the other.

    CHUNK, HALF             tokens of a chunk; half of them, which a program of `_scan_mix` and `_scan_pairs` takes
    E, S                    numbers of a head; numbers of b or c in a group
    BLOCK, HEADS            tokens (in `_scan_carry` numbers of a state) at a time; heads at a time
    DIRECTIONS              1 or 2; way: number of the direction
    REVERSED                whether the second direction reads from the end; over review tokens all read forwards
    ADJOINT                 whether the transposed operation runs, which turns gradients of y into those of x
    HAS_BEGIN               whether the sequence starts from given states, `begin`
    SECOND, CROSSES         whether the half is the chunk's second; whether the direction enters it from the other half
    EDGE                    position in the chunk of the direction's last token before the border of the halves
    ENTER                   position of the direction's last token, where the adjoint enters the chunk
    SIDE                    blocks of a chunk's pairs: 0 on the diagonal, 1 later rows, 2 later columns
    OF_B                    whether the gradient is that of b, not of c
    PRECISION               `input_precision` of `tl.dot`
    dt, steps               raw steps [b n k]; after bias and softplus [b r k rows]
    logs                    log2 of the decay inside the chunk, up to and with each token [b r k rows], at most 0
    columns                 logs - log2(steps): a pair's weight is exp2(logs of its row - columns of its column)
    v, k                    what is summed, x or dy [b rows k*e]; what it is weighted by, b or c [b rows g*s]
    pairs, dpairs           c b^T inside each chunk, or b c^T [b chunks g q q]; its gradient
    states                  [b chunks r k s e], of each chunk: what it adds, after `_scan_carry` what it starts from
    begin, end              states before and after the sequence [b r k s e], float32
    other                   in `_scan_carry` the forward pass's states; in `_scan_inter` b where k is c, else c
    products                adjoint state times forward state of each chunk [b r k chunks blocks]
    by_row, by_column       gradients of the weights' logarithms, summed along each row of the pairs, and along each
                            column, there without the factor of the step [b r k rows]
    by_token, own           the same through the states [b r k rows]; dy_i x_i [b k rows]
    row_stride, column_stride  strides of dpairs, exchanged where it is to be transposed
    per_group, split, share heads of a group; parts that they are shared out to; heads of a part"""
