//! The instruction set that kernels run on, detected once, and the macro that compiles a kernel for each.

use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// The target's baseline: what the compiler makes of plain loops.
    Portable,
    /// NEON, which every AArch64 processor has.
    Neon,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
}

impl Isa {
    /// The widest instruction set of this machine.
    ///
    /// The environment variable `REHEARSAL_ISA=portable|avx2` selects a narrower one, which changes the speed but no bit of
    /// a result.
    pub fn detect() -> Isa {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let widest = Self::widest();
            match std::env::var("REHEARSAL_ISA").as_deref() {
                Ok("portable") => Isa::Portable,
                Ok("avx2") if widest == Isa::Avx512 => Isa::Avx2,
                _ => widest,
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn widest() -> Isa {
        let has_512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        if has_512 {
            Isa::Avx512
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            Isa::Avx2
        } else {
            Isa::Portable
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn widest() -> Isa {
        Isa::Neon
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn widest() -> Isa {
        Isa::Portable
    }
}

/// Prefetches a cache line into the second-level cache, which allows more outstanding fetches than the first-level cache.
/// An address that is not mapped is ignored.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and does not fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Defines a function whose body is compiled once per instruction set; calls run the widest that this machine has.
///
/// The body is plain Rust over fixed-size lanes, which LLVM vectorises to the enabled width. Multiplications and additions
/// are fused only where the body says `mul_add`, so every version computes the same bits.
#[macro_export]
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::Isa::detect() {
                    // SAFETY: `detect` returns an instruction set that this machine has.
                    $crate::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::Isa::Portable | $crate::Isa::Neon => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub use per_isa;
