//! Boxed futures, for async methods of trait objects.

use std::future::Future;
use std::pin::Pin;

/// A boxed future that may borrow for `'a`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
