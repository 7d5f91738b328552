//! Average of products of two factors, cut back to their rank.

use faer::{Mat, MatRef};

/// Names what the bits of a decomposition depend on: faer chooses its kernels by the processor.
pub fn instruction_set() -> String {
    #[cfg(target_arch = "x86_64")]
    let features = [
        (" avx2", is_x86_feature_detected!("avx2")),
        (" fma", is_x86_feature_detected!("fma")),
        (" avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let features: [(&str, bool); 0] = [];
    let present: String = features.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect();
    format!("{}{present}", std::env::consts::ARCH)
}

/// Rows and columns of products, and the rank of their factors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductShape {
    /// Rows of `B`.
    pub rows: usize,
    /// Columns of `A`.
    pub columns: usize,
    /// Columns of `B`, which are the rows of `A`.
    pub rank: usize,
}

/// Nearest product of the same rank to an average of products, and squares of Frobenius norms.
pub struct CutProduct {
    /// `B`, row by row.
    pub up: Vec<f64>,
    /// `A`, row by row.
    pub down: Vec<f64>,
    /// Square of the norm of the average.
    pub norm: f64,
    /// Square of the distance of this product from the average.
    pub cut: f64,
    /// Square of the distance of the product of the averaged factors from the average.
    pub of_factors: f64,
}

/// Weighted products of two factors, whose average is taken.
///
/// The average `P = sum_k w_k B_k A_k` is the product of two stacks, `[w_1 B_1 ...]` and `[A_1; ...]`. With the QR
/// decompositions of both, `P = Q (R S^T) W^T`, so that the singular values of `P` are those of the small core `R S^T`
/// and `P` itself is never formed. Those of the largest `rank` singular values are the nearest matrix of that rank
/// (Eckart and Young, 1936). Each factor gets the square root of the singular values.
pub struct ProductStack {
    shape: ProductShape,
    weights: Vec<f64>,
    /// Factors `w B` beside each other.
    up: Mat<f64>,
    /// Transposed factors `A` beside each other.
    down: Mat<f64>,
}

impl ProductStack {
    /// Takes memory for some products.
    pub fn new(shape: ProductShape, products: usize) -> ProductStack {
        let stack = |extent| Mat::zeros(extent, products * shape.rank);
        ProductStack { shape, weights: Vec::with_capacity(products), up: stack(shape.rows), down: stack(shape.columns) }
    }

    /// Bytes of memory that the average of some products takes, with its result.
    pub fn bytes(shape: ProductShape, products: usize) -> usize {
        let stacked = products * shape.rank;
        // Both stacks, the decomposition of one of them, the result and its product, and the core's decomposition.
        let elements = (3 * stacked / 2 + 3 * shape.rank) * (shape.rows + shape.columns) + 10 * stacked * stacked;
        elements * size_of::<f64>()
    }

    /// Adds the product `weight B A`. `up` is `B` and `down` is `A`, row by row.
    pub fn push(&mut self, weight: f64, up: &[f64], down: &[f64]) {
        let ProductShape { rows, columns, rank } = self.shape;
        let first = self.weights.len() * rank;
        for k in 0..rank {
            (0..rows).for_each(|i| self.up[(i, first + k)] = weight * up[i * rank + k]);
            (0..columns).for_each(|j| self.down[(j, first + k)] = down[k * columns + j]);
        }
        self.weights.push(weight);
    }

    /// Averages the products, and cuts the average back to the rank of the factors.
    ///
    /// Returns `None` if the singular values do not converge.
    pub fn average(self) -> Option<CutProduct> {
        let ProductStack { shape: ProductShape { rows, columns, rank }, weights, up, down } = self;
        let [up, down] = [up, down].map(|stack| stack.qr());
        let core = up.thin_R() * down.thin_R().transpose();
        let svd = core.thin_svd().ok()?;
        let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        let kept = rank.min(values.len());
        // The average of each factor is the sum of the blocks of its stack, with the weights in it.
        let sum = |stack: MatRef<'_, f64>, weight: &dyn Fn(usize) -> f64| {
            Mat::from_fn(stack.nrows(), rank, |i, k| {
                (0..weights.len()).map(|p| weight(p) * stack[(i, p * rank + k)]).sum::<f64>()
            })
        };
        let factors = sum(up.thin_R(), &|_| 1.0) * sum(down.thin_R(), &|p| weights[p]).transpose();
        let root = Mat::from_fn(kept, kept, |i, j| if i == j { values[i].sqrt() } else { 0.0 });
        let new_up = up.compute_thin_Q() * (svd.U().get(.., ..kept) * &root);
        drop(up);
        let new_down = down.compute_thin_Q() * (svd.V().get(.., ..kept) * &root);
        let of = |factor: &Mat<f64>, i: usize, k: usize| if k < kept { factor[(i, k)] } else { 0.0 };
        Some(CutProduct {
            up: (0..rows * rank).map(|i| of(&new_up, i / rank, i % rank)).collect(),
            down: (0..rank * columns).map(|i| of(&new_down, i % columns, i / columns)).collect(),
            norm: values.iter().map(|value| value * value).sum(),
            cut: values[kept..].iter().map(|value| value * value).sum(),
            of_factors: (factors - core).squared_norm_l2(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Scale;

    /// Returns numbers that all differ, by a fixed sequence.
    fn numbers(seed: usize, count: usize) -> Vec<f64> {
        (0..count).map(|i| ((seed * 7919 + i * 104_729) as f64 * 0.618).sin()).collect()
    }

    fn product(up: &[f64], down: &[f64], shape: ProductShape) -> Mat<f64> {
        let ProductShape { rows, columns, rank } = shape;
        Mat::from_fn(rows, columns, |i, j| (0..rank).map(|k| up[i * rank + k] * down[k * columns + j]).sum())
    }

    /// Compares with the singular value decomposition of the whole matrix.
    #[test]
    fn average_is_the_nearest_product_of_the_rank() {
        for (rows, columns, rank, count) in [(9, 7, 2, 3), (5, 20, 3, 4), (3, 4, 6, 2), (8, 8, 1, 1), (1, 6, 1, 5)] {
            let shape = ProductShape { rows, columns, rank };
            let mut stack = ProductStack::new(shape, count);
            let mut whole = Mat::<f64>::zeros(rows, columns);
            let [mut up, mut down] = [vec![0.0; rows * rank], vec![0.0; rank * columns]];
            for (k, weight) in [0.5, 0.2, 0.15, 0.1, 0.05].into_iter().take(count).enumerate() {
                let [b, a] = [numbers(2 * k + 1, rows * rank), numbers(2 * k + 2, rank * columns)];
                stack.push(weight, &b, &a);
                whole += product(&b, &a, shape) * Scale(weight);
                up.iter_mut().zip(&b).for_each(|(sum, b)| *sum += weight * b);
                down.iter_mut().zip(&a).for_each(|(sum, a)| *sum += weight * a);
            }
            let cut = stack.average().unwrap();
            let values: Vec<f64> = whole.singular_values().unwrap();
            let expected: f64 = values.iter().skip(rank).map(|value| value * value).sum();
            let norm = whole.squared_norm_l2();
            let close = |is: f64, expected: f64| (is - expected).abs() <= 1e-13 * norm;
            assert!(close(cut.norm, norm) && close(cut.cut, expected), "{shape:?}: {} {expected}", cut.cut);
            let distance = (product(&cut.up, &cut.down, shape) - &whole).squared_norm_l2();
            assert!(close(distance, expected), "{shape:?}: {distance} {expected}");
            let of_factors = (product(&up, &down, shape) - &whole).squared_norm_l2();
            assert!(close(cut.of_factors, of_factors), "{shape:?}: {} {of_factors}", cut.of_factors);
            assert!(count == 1 || of_factors > 1e-6 * norm, "{shape:?}: the oracle shows no difference");
        }
    }

    #[test]
    fn products_of_zeros_stay_zeros() {
        let shape = ProductShape { rows: 3, columns: 2, rank: 2 };
        let mut stack = ProductStack::new(shape, 1);
        stack.push(1.0, &[0.0; 6], &numbers(1, 4));
        let cut = stack.average().unwrap();
        assert_eq!((cut.up, cut.norm, cut.cut, cut.of_factors), (vec![0.0; 6], 0.0, 0.0, 0.0));
    }
}
