"""Trainium2: NeuronCore-v3, third generation. The one with per-instruction measurements."""

from __future__ import annotations

from nki_kernels.hardware.laws import load_laws
from nki_kernels.hardware.origin import documented, estimated, measured
from nki_kernels.hardware.spec import (
    CoreSpec,
    DmaSpec,
    GpSimdSpec,
    PeSpec,
    ScalarSpec,
    SyncSpec,
    VectorSpec,
)

ARCH = "AWS Neuron SDK 2.32, nki/guides/architecture/trainium2_arch"
PERF = "AWS Neuron SDK 2.26, NKI performance guide and nki.isa cost formulas"
PROBE = "voyager-compiler, isolated trn2 probes (neuronx-cc 2.22)"
FIGURE = "AWS Neuron SDK, kernel-optimization tutorial, zoomed profile figures"
DMA_GUIDE = "AWS Neuron SDK 2.32, nki/deep-dives/nki-dma-bandwidth-guide"
DMA_PROBE = "voyager-compiler, single-DMA probes, software DGE, 128 partitions, 32-256 KiB"
PACKETS = "CS149 assignment 4 profiles, static descriptors: 4,000 B 170.6 ns, 32,000 B 1302 ns"
EXPLORER = "AWS Neuron SDK, tools/neuron-explorer/overview-summary-page"

PE = PeSpec(
    clock_ghz=documented(2.4, ARCH),
    rows=documented(128, ARCH),
    columns=documented(128, ARCH),
    min_stream_cycles=documented(64, PERF),
    overhead_short_n=measured(128, PROBE),
    overhead_short_cycles=measured(
        12.0, f"{PROBE}: float32 stream n=128, 223 ns per pair", low=6.0
    ),
    overhead_long_n=measured(512, PROBE),
    overhead_long_cycles=measured(
        6.0, f"{FIGURE}: 858.4 ns pitch per float32 pair; bf16 by analogy", low=6.0, high=16.0
    ),
    fp32_passes=measured(2, f"{PROBE}; the tutorial counts 65,536 MATMUL for 32,768 calls"),
    fp32_cycles_per_row=measured(2.0, PROBE),
    ldw_fp32_cycles=measured(2.0, f"{FIGURE}: feed starts 107-112 ns after its weight load"),
    ldw_cycles=estimated(
        0.25,
        "documented as up to 4x faster than a matmul; conditions unpublished",
        low=0.25,
        high=1.0,
    ),
    transpose_fp32_ns=measured(168.0, PROBE),
    transpose_fp32_throttled_ns=measured(213.0, PROBE),
    drain_ns=measured(171.0, f"{FIGURE}: span 600 - pitch 429; agrees with {PROBE}"),
    free_step_bytes=measured(8, PROBE),
    strided_factor=measured(2.0, f"{PROBE}: float32 n=128, stride 1 to 16: 223 to 437 ns"),
    double_row_rows=documented(2, ARCH),
    mx_rows=documented(1, f"{ARCH}: no MX data on this generation"),
    tf32_cycles_per_row=documented(1.0, PERF),
    cold_front_ns=measured(15.0, f"{PROBE}: isolated bf16 203 ns less drain and weight load"),
    cold_front_fp32_ns=measured(100.0, f"{PROBE}: isolated float32 381 ns less drain and load"),
    throttle=documented(0.5, EXPLORER),
    throttle_window_ns=documented(3000.0, f"{EXPLORER}: about 3 us; the ramp's shape is not given"),
    throttle_share=documented(0.5, EXPLORER),
)

VECTOR = VectorSpec(
    clock_ghz=documented(0.96, ARCH),
    startup_ns=measured(160.0, PROBE),
    psum_startup_ns=measured(156.0, PROBE),
    memset_startup_ns=measured(58.0, PROBE),
    gap_ns=estimated(
        100.0,
        "documented ~100 cycles; scalar_tensor_tensor n=512 runs at n + 102",
        low=0.0,
        high=150.0,
    ),
    min_issue_cycles=documented(64, PERF),
    dynamic_min_cycles=documented(600, PERF),
    read_ns=estimated(60.0, "documented ~60 cycles of tensor access latency", low=0.0, high=160.0),
    free_step_bytes=measured(8, PROBE),
    strided_factor=estimated(2.0, "16-byte sectors, as measured on ACT", low=1.0, high=4.0),
    one_input_cycles=documented(1.0, PERF),
    two_input_cycles=measured(1.0, PROBE),
    two_input_2byte_cycles=measured(0.5, PROBE),
    copy_2byte_cycles=measured(0.26, PROBE),
    copy_2byte_strided_cycles=measured(0.69, f"{PROBE}; documented 0.5"),
    copy_2byte_psum_cycles=documented(0.5, ARCH, low=0.5, high=1.0),
    copy_4byte_cycles=measured(0.5, PROBE),
    copy_widening_cycles=measured(0.77, PROBE),
    copy_narrow_cycles=measured(0.5, "AWS RMSNorm-quantize profile: bf16 to fp8, n=16384, 8766 ns"),
    copy_psum_cycles=measured(1.0, PROBE),
    psum_two_input_cycles=measured(1.0, PROBE),
    reduce_cycles=measured(1.0, PROBE),
    reduce_2byte_cycles=measured(1.0, f"{PROBE}; documented 0.5"),
    scan_cycles=measured(2.0, PROBE),
    reciprocal_cycles=measured(6.0, f"{PROBE}; documented 8"),
    memset_cycles=measured(0.8, PROBE),
    fused_two_input_cycles=measured(
        1.0, "AWS RMSNorm-quantize profile: n + 102; documented 2 for most operand types", high=2.0
    ),
    predicated_cycles=documented(2.0, PERF),
    exponential_cycles=estimated(0.25, "fourth generation: four times the rate of activation"),
    accumulate_cycles=documented(64, PERF),
    scan_seed_ns=measured(60.0, PROBE),
    mask_load_ns=measured(13.0, PROBE),
    transpose_startup_ns=estimated(200.0, "32x32 transpose, 233 ns, less its 32 rows"),
    bn_aggr_cycles=documented(13 / 3, PERF),
    shares_gpsimd_port=documented(True, ARCH),
    gpsimd_exclusive=documented(False, ARCH),
)

SCALAR = ScalarSpec(
    clock_ghz=documented(1.2, ARCH),
    startup_ns=measured(190.0, PROBE),
    psum_startup_ns=measured(160.0, PROBE),
    memset_startup_ns=estimated(190.0, "as a copy"),
    gap_ns=measured(92.0, f"{PROBE}: independent copies n=128 every 199 ns", low=0.0, high=110.0),
    min_issue_cycles=documented(64, PERF),
    dynamic_min_cycles=documented(600, PERF),
    read_ns=estimated(60.0, "documented ~60 cycles of tensor access latency", low=0.0, high=190.0),
    free_step_bytes=measured(8, PROBE),
    strided_factor=measured(2.0, f"{PROBE}: copies n=128, source stride 4 to 16, every 318 ns"),
    one_input_cycles=measured(1.0, PROBE),
    two_input_cycles=estimated(1.0, "the second operand is a [P, 1] vector on this engine"),
    two_input_2byte_cycles=estimated(1.0, "the second operand is a [P, 1] vector on this engine"),
    lut_startup_ns=measured(293.0, PROBE),
    lut_psum_startup_ns=measured(255.0, PROBE),
    fast_2byte_cycles=measured(1.0, PROBE),
    vector_read_ns=measured(91.0, PROBE),
    lut_vector_read_ns=estimated(
        0.0, "rsqrt with a bias against tensor_scalar and rsqrt: both ladders", low=0.0, high=91.0
    ),
    strided_dst_issue_cycles=measured(0.27, f"{PROBE}: copies n=128, strided destination, 228 ns"),
    accumulator_forward_ns=measured(200.7, PROBE),
    read_accumulator_ns=measured(279.0, PROBE),
    read_accumulator_issue_ns=measured(185.0, PROBE),
    table_load_ns=measured(1283.0, "AWS DMA overview and NKI profiles, 1276-1286 ns"),
    table_sets=estimated(
        (
            frozenset({"square", "rsqrt", "sqrt"}),
            frozenset({"exp"}),
            frozenset({"sigmoid"}),
            frozenset({"silu", "silu_dx"}),
            frozenset({"gelu", "gelu_dx"}),
            frozenset({"softplus"}),
        ),
        "third-party notes; a function in none of them is taken as a set of its own",
    ),
    psum_exclusive=documented(False, ARCH),
)

GPSIMD = GpSimdSpec(
    clock_ghz=documented(1.2, ARCH),
    startup_ns=measured(176.87, f"{PROBE}: affine_select"),
    psum_startup_ns=estimated(176.87, "as SBUF; GpSimd has no PSUM port"),
    memset_startup_ns=estimated(126.9, "start only: nothing is read", low=50.0, high=176.87),
    gap_ns=measured(126.9, f"{PROBE}: affine_select; documented 150 cycles"),
    min_issue_cycles=documented(64, PERF),
    dynamic_min_cycles=documented(600, PERF),
    read_ns=estimated(60.0, "as the other engines", low=0.0, high=180.0),
    free_step_bytes=estimated(8, "as measured on ACT"),
    strided_factor=estimated(2.0, "16-byte sectors, as measured on ACT", low=1.0, high=4.0),
    one_input_cycles=estimated(1.0, "SBUF interface: one 32-bit read and write a cycle", high=4.0),
    two_input_cycles=estimated(2.0, "SBUF interface: one 32-bit read and write a cycle", high=4.0),
    two_input_2byte_cycles=estimated(1.0, "two 2-byte elements per 32-bit read", high=2.0),
    topk_cycles=documented(4.0, "AWS Neuron SDK 2.32, nki.isa.topk"),
    rsqrt_cycles=documented(4.0, PERF),
    core_partitions=documented(16, "AWS Neuron SDK 2.32, nki.isa.local_gather"),
)

DMA = DmaSpec(
    engine_bytes_per_ns=measured(24.6, PACKETS, low=23.5, high=24.6),
    descriptor_ns=measured(8.0, f"{PACKETS}; software DGE rows of 512 B 29-34, 2 KiB 89-93 ns"),
    max_descriptor_bytes=documented(65536, DMA_GUIDE),
    sw_queue_ns=measured(485.0, "CS149 assignment 4: one-descriptor DMAs every 0.486 us"),
    sw_queue_descriptor_ns=measured(
        0.95, f"{PROBE}: 128 descriptors every 0.60 us; more than 128 is extrapolated", low=0.0
    ),
    sw_indirect_descriptor_ns=estimated(15.6, "about 1 us per 64 indexed rows", low=1.0, high=31.0),
    hw_queue_ns=documented(
        600.0, "AWS Neuron SDK 2.32, nki-dge: about 600 ns", low=520.0, high=610.0
    ),
    static_queue_ns=measured(86.0, "AWS DMA overview figure, SyncE"),
    load_dispatch_ns=measured(751.0, DMA_PROBE),
    store_dispatch_ns=measured(565.5, DMA_PROBE),
    load_latency_ns=measured(293.0, DMA_PROBE),
    load_latency_slope=measured(1.3046, DMA_PROBE),
    store_latency_ns=measured(162.0, DMA_PROBE),
    store_latency_slope=measured(0.9628, DMA_PROBE),
    law_min_bytes=measured(32768, DMA_PROBE),
    law_max_bytes=measured(262144, DMA_PROBE),
    load_notify_ns=measured(314.5, DMA_PROBE),
    store_notify_ns=measured(355.0, DMA_PROBE),
    turn_ns=estimated(
        1000.0,
        "documented as round-robin between packets; a packet holds up to 64 KiB, 2.7 us",
        low=100.0,
        high=2700.0,
    ),
    transpose_hbm_share=documented(0.9, ARCH, high=0.9),
    transpose_sbuf_share=documented(0.5, ARCH, high=0.5),
    compute_share=documented(0.5, "AWS NKI documents: DMA with cast or addition runs at half rate"),
    small_write_bytes=documented(512, DMA_GUIDE),
    small_write_factor=estimated(
        1.0, "documented as read-modify-write; 256 B rows of the store probe show none", high=2.0
    ),
)

SYNC = SyncSpec(
    same_engine_ns=estimated(
        28.0, "fit of fused against separate instructions", low=0.0, high=58.0
    ),
    other_engine_ns=estimated(40.0, "fit of two cross-engine ladders", low=24.0, high=100.0),
    to_dma_ns=measured(30.0, "AWS DMA overview figure, static descriptors: 29 ns"),
    to_software_store_ns=measured(
        881.0,
        "AWS DMA overview figure, software descriptors: exp done to store trigger; one study has "
        "893.5 for every waiting trigger of that queue",
        low=30.0,
        high=893.5,
    ),
    from_dma_ns=measured(18.0, "AWS DMA overview figures: 16-20 ns after the last increment"),
    register_move_ns=measured(68.0, PROBE),
    register_memory_ns=estimated(1300.0, "documented DMA start latency", low=100.0, high=2000.0),
    loop_iteration_ns=estimated(6500.0, "reported as 4 to 9 us", low=4000.0, high=9000.0),
    core_barrier_ns=estimated(1500.0, "inter-core hop of 1 to 2 us", low=1000.0, high=2000.0),
    launch_ns=measured(9400.0, f"{PROBE}: core latency less dataflow", low=9400.0, high=15000.0),
    launch_lnc2_ns=estimated(
        30000.0, "27 to 33 us in whole-kernel figures", low=27000.0, high=33000.0
    ),
    pair_bytes_per_ns=measured(
        716.0, "AWS profiler's bandwidth base; 648 sustained", low=648.0, high=716.0
    ),
)

TRN2 = CoreSpec(
    name="trn2",
    generation=documented(3, ARCH),
    projected=False,
    partitions=documented(128, ARCH),
    quadrant=documented(32, ARCH),
    sbuf_bytes=documented(224 * 1024, ARCH),
    sbuf_usable_bytes=documented(
        224 * 1024 - 16384 - 8, "aws-neuron/nki-library, mlp_cte_constants"
    ),
    sbuf_align=estimated(
        4, "value of nl.tile_size.sbuf_min_align is not published", low=1, high=64
    ),
    psum_banks=documented(8, ARCH),
    psum_bank_bytes=documented(2048, ARCH),
    stationary_fmax=documented(128, "AWS Neuron SDK 2.32, nl.tile_size"),
    moving_fmax=documented(512, "AWS Neuron SDK 2.32, nl.tile_size"),
    bn_stats_fmax=documented(512, "AWS Neuron SDK 2.32, nl.tile_size"),
    dma_engines=documented(16, ARCH),
    partitions_per_dma_engine=measured(8, "voyager-compiler, row tiles of 89 and 128 partitions"),
    hbm_bytes_per_ns=documented(368.0, DMA_GUIDE),
    pe=PE,
    vector=VECTOR,
    scalar=SCALAR,
    gpsimd=GPSIMD,
    dma=DMA,
    sync=SYNC,
    op_laws=load_laws("trn2_op_laws.csv"),
)
