//! Compiles every kernel's source with NVRTC, the compiler that runs on GPU machines. NVRTC itself needs no GPU.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;
use std::ptr::null_mut;

use libloading::{Library, Symbol};
use rehearsal_kernels::gpu::{ElementType, FILES, Source};

/// The NVRTC library: the one that `REHEARSAL_NVRTC` names, or the one the system's loader finds.
struct Nvrtc(Library);

impl Nvrtc {
    fn open() -> Option<Self> {
        let named = std::env::var("REHEARSAL_NVRTC").ok();
        let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(String::from);
        if let Some(folder) = named.as_ref().and_then(|name| Path::new(name).parent()) {
            // NVRTC loads its builtins library by name. If that is loaded already, it is found wherever it is.
            let beside = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
            for builtins in beside.filter(|p| p.to_string_lossy().contains("libnvrtc-builtins.so.")) {
                // SAFETY: the vendor's library, which does nothing when it is loaded.
                std::mem::forget(unsafe { Library::new(builtins) });
            }
        }
        // SAFETY: as above.
        let library = named.into_iter().chain(names).find_map(|name| unsafe { Library::new(name) }.ok());
        if library.is_none() {
            let what = "no NVRTC; REHEARSAL_NVRTC names the library (PyPI: nvidia-cuda-nvrtc)";
            crate::support::parts::skip(crate::support::parts::Part::Nvrtc, what);
        }
        library.map(Self)
    }

    /// Compiles a source; the compiler's log if it fails.
    fn compile(&self, name: &str, text: &str, options: &[String]) -> Result<(), String> {
        type Program = *mut u8;
        let (name, text) = (CString::new(name).unwrap(), CString::new(text).unwrap());
        let options: Vec<CString> = options.iter().map(|o| CString::new(o.as_str()).unwrap()).collect();
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: the signatures are those of nvrtc.h; the program is destroyed once.
        unsafe {
            let create: Symbol<
                '_,
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.0.get("nvrtcCreateProgram").unwrap();
            let compile: Symbol<'_, unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int> =
                self.0.get("nvrtcCompileProgram").unwrap();
            let log_size: Symbol<'_, unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                self.0.get("nvrtcGetProgramLogSize").unwrap();
            let log: Symbol<'_, unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                self.0.get("nvrtcGetProgramLog").unwrap();
            let destroy: Symbol<'_, unsafe extern "C" fn(*mut Program) -> c_int> =
                self.0.get("nvrtcDestroyProgram").unwrap();
            let mut program = null_mut();
            assert_eq!(create(&mut program, text.as_ptr(), name.as_ptr(), 0, null_mut(), null_mut()), 0);
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let mut size = 0;
            log_size(program, &mut size);
            let mut text = vec![0u8; size.max(1)];
            log(program, text.as_mut_ptr().cast());
            destroy(&mut program);
            let text = CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned();
            if status == 0 { Ok(()) } else { Err(text) }
        }
    }
}

#[test]
fn every_kernel_compiles_for_a_gpu() {
    let Some(nvrtc) = Nvrtc::open() else { return };
    for file in FILES.into_iter().chain([&rehearsal_learn::adamw::GPU_SOURCE]) {
        for element in [ElementType::F32, ElementType::Bf16] {
            for head_dim in if file.per_head_dim { &[64, 80, 128][..] } else { &[1] } {
                let source = Source { file, element, head_dim: *head_dim };
                assert!(!source.kernels().is_empty(), "{} has no kernel", file.name);
                // Ampere and Hopper.
                for architecture in ["compute_80", "compute_90"] {
                    nvrtc
                        .compile(file.name, &source.text(), &source.options(architecture))
                        .unwrap_or_else(|log| panic!("{source:?} for {architecture}:\n{log}"));
                }
            }
        }
    }
    let options = ["--gpu-architecture=compute_80".to_string(), "--std=c++17".to_string()];
    assert!(nvrtc.compile("wrong", "__global__ void f() { undeclared(); }", &options).is_err());
}
