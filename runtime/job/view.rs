//! The viewer that a job serves of itself.

use std::any::Any;

use crate::access::JobReader;
use crate::error::Result;
#[cfg(feature = "view")]
use crate::listen::{self, Bound};
use crate::settings::ViewSettings;
#[cfg(feature = "view")]
use crate::view::{self, Access, Viewer};

/// A running server; it stops when this is dropped.
pub type Served = Box<dyn Any + Send>;

/// An address that a job will serve its viewer on, bound before the job writes anything.
pub struct ViewAddress {
    #[cfg(feature = "view")]
    bound: Option<(Bound, Access)>,
}

impl ViewAddress {
    /// Binds `view.listen`, if it is set.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound, or the token is missing.
    #[cfg(feature = "view")]
    pub fn bind(settings: &ViewSettings) -> Result<Self> {
        let bind = |address| {
            let access = Access::from_env(address, settings.token_env.as_deref())?.with_token_to_change()?;
            Ok::<_, crate::Error>((listen::bind(view::WHAT, "view.listen", address)?, access))
        };
        Ok(Self { bound: settings.listen.map(bind).transpose()? })
    }

    /// Serves a job; returns the server and its URL, which may hold the token.
    #[cfg(feature = "view")]
    pub fn serve(self, job: JobReader) -> Result<Option<(Served, String)>> {
        let Some((bound, access)) = self.bound else { return Ok(None) };
        let server = view::serve_on(bound, Viewer::live(job), access.clone())?;
        let url = access.url(server.address);
        Ok(Some((Box::new(server), url)))
    }

    /// In a build without the viewer, the configuration has refused an address.
    #[cfg(not(feature = "view"))]
    pub fn bind(_: &ViewSettings) -> Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(feature = "view"))]
    pub fn serve(self, _: JobReader) -> Result<Option<(Served, String)>> {
        Ok(None)
    }
}
