//! Every kernel's source goes through NVRTC, the compiler that a GPU machine will run; it needs no GPU.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;
use std::ptr::null_mut;

use libloading::{Library, Symbol};
use rehearsal::lm::gpu::{FILES, Narrow, Source};

/// NVRTC: `REHEARSAL_NVRTC` names the library, or it is where the system finds it.
struct Nvrtc(Library);

impl Nvrtc {
    fn open() -> Option<Self> {
        let named = std::env::var("REHEARSAL_NVRTC").ok();
        let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(String::from);
        if let Some(folder) = named.as_ref().and_then(|name| Path::new(name).parent()) {
            // NVRTC looks for its other half by name alone: loaded already, it is found wherever it lies.
            let beside = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
            for half in beside.filter(|p| p.to_string_lossy().contains("libnvrtc-builtins.so.")) {
                // SAFETY: the vendor's library, which does nothing when it is loaded.
                std::mem::forget(unsafe { Library::new(half) });
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

    /// The compiler's complaints, if it has any.
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
            let mut said = vec![0u8; size.max(1)];
            log(program, said.as_mut_ptr().cast());
            destroy(&mut program);
            let said = CStr::from_bytes_until_nul(&said).unwrap_or_default().to_string_lossy().into_owned();
            if status == 0 { Ok(()) } else { Err(said) }
        }
    }
}

#[test]
fn every_kernel_compiles_for_a_gpu() {
    let Some(nvrtc) = Nvrtc::open() else { return };
    for (file, _) in FILES {
        for narrow in [Narrow::F32, Narrow::Bf16] {
            for dim in if matches!(file, "attention" | "decode") { &[64, 80, 128][..] } else { &[1] } {
                let source = Source { file, narrow, dim: *dim };
                assert!(!source.kernels().is_empty(), "{file} has no kernel");
                // Ampere and Hopper.
                for architecture in ["compute_80", "compute_90"] {
                    nvrtc
                        .compile(file, &source.text(), &source.options(architecture))
                        .unwrap_or_else(|log| panic!("{source:?} for {architecture}:\n{log}"));
                }
            }
        }
    }
    let options = ["--gpu-architecture=compute_80".to_string(), "--std=c++17".to_string()];
    let adamw = rehearsal_learn::ADAMW_CUDA;
    nvrtc.compile("adamw", adamw, &options).unwrap_or_else(|log| panic!("adamw:\n{log}"));
    assert!(nvrtc.compile("wrong", "__global__ void f() { undeclared(); }", &options).is_err());
}
