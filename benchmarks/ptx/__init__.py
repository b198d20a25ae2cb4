"""The compiled kernels, executed: the PTX that Triton emits for sm_80 and sm_90, run on a CPU, in numpy.

``make ptx`` runs every kernel of :mod:`fastunet.kernels`, forward and backward, in bfloat16, and prints what each one
errs beside PyTorch and what was found: races, accesses out of bounds, missing fences and waits, stores of different
values to one address. It lies among the benchmarks because it is an instrument as the gate is, which runs the same
launches (:mod:`benchmarks.cases`, :mod:`benchmarks.recorder`) for the same chips and reads the code that this executes;
``tests/test_ptx.py`` holds a dozen cases to it.

========================== ===========================================================================================
:mod:`.program`            PTX text: parameters, registers, instructions, basic blocks
:mod:`.values`             what registers hold; arithmetic as exact, and as inexact, as the ISA says
:mod:`.memory`             global and shared memory, and the shadows that find races
:mod:`.machine`            the threads of some CTAs, in step, masked where they diverge
:mod:`.asynchronous`       copies, bulk tensor copies, mbarriers and the products of warpgroups, all as late as may be
:mod:`.instructions`       each instruction as a function of these
:mod:`.launches`           the project's launches, sent here
:mod:`.trials`, `.faults`  what runs, and how it is judged; faults planted in the PTX, to see that they are found
========================== ===========================================================================================

What it does not see: what ptxas makes of the PTX; the order in which a tensor core adds, and that it truncates while it
does; lanes of one warp that communicate through shared memory with no ``bar.warp.sync``, which Triton takes to be in
step; accesses that only some sizes make. A kernel that passes has no race *on these inputs*.

AMD's code would need as much again. Triton's ``.asm["amdgcn"]`` is machine code in text, after register allocation: an
interpreter of gfx942 needs scalar and vector registers with EXEC masks of 64 lanes, ``s_waitcnt`` (loads arrive in
order and as late as their counter allows: registers that are read before are to be NaN, as those of ``wgmma`` are
here), LDS with ``ds_read``/``ds_write``/``ds_bpermute`` and the same shadows in epochs of ``s_barrier``, ``buffer_``
instructions whose descriptors bound the access, DPP and ``v_permlane`` operands, and the MFMA fragments of 16×16×16,
32×32×8 and their 4-pass siblings. tinygrad's emulator runs several of these kernels; its 32×32 MFMA and DPP that write
over their source were wrong, so it would be an oracle for the rest only.
"""
