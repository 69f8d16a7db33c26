//! Views of matrices.

/// A strided view of a matrix: element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a, E = f32> {
    pub(super) data: &'a [E],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a, E> View<'a, E> {
    /// A row-major `rows` × `cols` matrix.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows}x{cols} view");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Some of the rows of a row-major view.
    pub fn rows(self, range: std::ops::Range<usize>) -> Self {
        assert!(self.col_stride == 1 && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let end = if range.is_empty() { 0 } else { (range.end - 1) * self.row_stride + self.cols };
        Self { data: &self.data[(range.start * self.row_stride).min(end)..end], rows: range.len(), ..self }
    }

    /// Some of the columns of a row-major view.
    pub fn columns(self, range: std::ops::Range<usize>) -> Self {
        assert!(self.col_stride == 1 && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let end = if self.rows == 0 { 0 } else { (self.rows - 1) * self.row_stride + range.end };
        Self { data: &self.data[range.start.min(end)..end], cols: range.len(), ..self }
    }

    /// A row of a row-major view.
    pub fn row(&self, row: usize) -> &'a [E] {
        assert!(self.col_stride == 1 && row < self.rows, "row {row} of {}", self.rows);
        &self.data[row * self.row_stride..row * self.row_stride + self.cols]
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}
