//! Which instruction set the kernels run on, found once, and the macro that compiles a kernel for each.

use std::sync::OnceLock;

/// An instruction set a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the compiler makes of plain loops.
    Portable,
    /// NEON, which every AArch64 has.
    Neon,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
}

impl Isa {
    /// The widest instruction set of this machine.
    ///
    /// `REHEARSAL_ISA=portable|avx2` asks for a narrower one, which changes the speed and no bit of a result.
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

/// Asks for a line of memory that is read soon, into the second-level cache: there are more fetches under way at a time than
/// into the first. Nothing happens where there is no memory.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint.
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

/// Compiles the body once per instruction set and calls the one that fits this machine.
///
/// The body is plain Rust over fixed-size lanes; LLVM turns it into vectors of the enabled width.
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
                match $crate::kernels::Isa::detect() {
                    // SAFETY: `detect` returns an instruction set that this machine has.
                    $crate::kernels::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::kernels::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::Isa::Portable | $crate::kernels::Isa::Neon => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use per_isa;
