"""A core of a few partitions, so that tests reach every remainder case in milliseconds.

It behaves like the third generation and costs what trn2 costs; only its sizes are invented. A
kernel that works here contains no hardware constant of its own.
"""

from __future__ import annotations

from nki_kernels.hardware.origin import estimated
from nki_kernels.hardware.trn2 import TRN2

INVENTED = "invented: small, and unlike every real size"

TOY = TRN2.derive(
    name="toy",
    projected=True,
    partitions=estimated(8, INVENTED),
    quadrant=estimated(2, INVENTED),
    sbuf_bytes=estimated(4096 + 512, INVENTED),
    sbuf_usable_bytes=estimated(4096, INVENTED),
    psum_banks=estimated(4, INVENTED),
    psum_bank_bytes=estimated(64, INVENTED),
    stationary_fmax=estimated(8, INVENTED),
    moving_fmax=estimated(16, INVENTED),
    bn_stats_fmax=estimated(16, INVENTED),
    dma_engines=estimated(8, INVENTED),
    partitions_per_dma_engine=estimated(1, INVENTED),
    gpsimd=TRN2.gpsimd.derive(core_partitions=estimated(4, INVENTED)),
    pe=TRN2.pe.derive(rows=estimated(8, INVENTED), columns=estimated(8, INVENTED)),
)
