//! Arithmetic of tensors in rectangles that tile them, without their elements.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{ControlFlow, Range};

/// Rectangle of a tensor. Its elements are in one part, which holds them in a C order of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Index of its first element along each dimension of the tensor.
    offset: Vec<usize>,
    shape: Vec<usize>,
    /// Index of the part that holds it.
    pub part: usize,
    /// Element of the part that is its first.
    first: usize,
    /// Distance of neighbouring elements along each dimension, in elements of the part.
    strides: Vec<usize>,
}

impl Tile {
    /// Returns the rectangle that a whole part is; `None` if it has more elements than there are numbers.
    pub(crate) fn whole(offset: Vec<usize>, shape: Vec<usize>, part: usize) -> Option<Tile> {
        volume(&shape)?;
        Some(Tile { strides: strides(&shape), offset, shape, part, first: 0 })
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Returns true if all elements are within a tensor.
    fn fits(&self, grid: &[usize]) -> bool {
        let mut extents = self.offset.iter().zip(&self.shape).zip(grid);
        self.offset.len() == grid.len()
            && self.shape.len() == grid.len()
            && extents.all(|((offset, extent), whole)| offset.checked_add(*extent).is_some_and(|end| end <= *whole))
    }

    fn overlaps(&self, other: &Tile) -> bool {
        let ends_behind = |a: &Tile, b: &Tile, i: usize| a.offset[i] + a.shape[i] > b.offset[i];
        (0..self.shape.len()).all(|i| ends_behind(self, other, i) && ends_behind(other, self, i))
    }

    /// Returns the rectangle that is also in another one of the same tensor, as a rectangle of that one.
    fn within(&self, offset: &[usize], shape: &[usize]) -> Option<Tile> {
        let mut tile = self.clone();
        for i in 0..shape.len() {
            let start = self.offset[i].max(offset[i]);
            let end = (self.offset[i] + self.shape[i]).min(offset[i] + shape[i]);
            tile.shape[i] = end.checked_sub(start).filter(|&extent| extent > 0)?;
            tile.offset[i] = start - offset[i];
            tile.first += (start - self.offset[i]) * self.strides[i];
        }
        Some(tile)
    }
}

/// Rectangle at its place among the others. A row is a number of elements that follow each other both in the tensor and
/// in the part.
#[derive(Debug)]
struct PlacedTile {
    tile: Tile,
    /// Number of dimensions before those of a row.
    rank: usize,
    /// Elements of a row.
    row: usize,
    /// Number of rows.
    rows: usize,
    /// Index in the tensor of the first element.
    start: usize,
    /// Index in the tensor behind the last element, and behind that of any rectangle before.
    reach: usize,
}

impl PlacedTile {
    fn new(tile: Tile, grid: &[usize], grid_strides: &[usize]) -> PlacedTile {
        let (mut rank, mut row) = (grid.len(), 1);
        while let Some(i) = rank.checked_sub(1) {
            let follows = tile.shape[i] == 1 || tile.strides[i] == row;
            if !follows || (rank < grid.len() && tile.shape[rank] != grid[rank]) {
                break;
            }
            (rank, row) = (i, row * tile.shape[i]);
        }
        let rows = tile.shape[..rank].iter().product();
        let mut placed = PlacedTile { tile, rank, row, rows, start: 0, reach: 0 };
        placed.start = placed.row_at(0, grid_strides).0;
        placed.reach = placed.row_at(rows - 1, grid_strides).0 + row;
        placed
    }

    /// Returns the index in the tensor of the first element of a row, and that in the part.
    fn row_at(&self, mut row: usize, grid_strides: &[usize]) -> (usize, usize) {
        let Tile { offset, shape, first, strides, .. } = &self.tile;
        let mut start: usize = offset.iter().zip(grid_strides).map(|(offset, stride)| offset * stride).sum();
        let mut first = *first;
        for i in (0..self.rank).rev() {
            let place = if i == 0 { row } else { row % shape[i] };
            row /= shape[i];
            start += place * grid_strides[i];
            first += place * strides[i];
        }
        (start, first)
    }
}

/// Consecutive elements of a tensor that follow each other in one part too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Index of the part.
    pub part: usize,
    /// Elements of the tensor.
    pub elements: Range<usize>,
    /// Element of the part that is the first.
    pub first: usize,
}

/// Stretches of equal length, at equal distances in the tensor and in the part.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub first: Stretch,
    pub count: usize,
    /// Distance in the tensor, in elements.
    pub stride: usize,
    /// Distance in the part, in elements.
    pub part_stride: usize,
}

/// Rectangles that cover a tensor, each element once.
#[derive(Debug)]
pub(crate) struct Tiling {
    /// Extents of the tensor, or its number of elements if it is cut as a list.
    grid: Vec<usize>,
    strides: Vec<usize>,
    /// In order of their first elements, without empty ones.
    tiles: Vec<PlacedTile>,
}

/// Reason why rectangles do not tile a tensor, with their indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TilingFault {
    TooLarge,
    /// A rectangle is partly outside of the tensor.
    Outside(usize),
    Overlap(usize, usize),
    /// Elements are in no rectangle.
    Hole {
        covered: usize,
        whole: usize,
    },
}

impl fmt::Display for TilingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TilingFault::TooLarge => f.write_str("are too large"),
            TilingFault::Outside(_) => f.write_str("lead out of its shape"),
            TilingFault::Overlap(..) => f.write_str("overlap"),
            TilingFault::Hole { covered, whole } => write!(f, "hold {covered} of its {whole} elements"),
        }
    }
}

impl Tiling {
    /// Checks that rectangles cover a tensor of these extents, each element once.
    ///
    /// # Errors
    /// The reason if they do not.
    pub(crate) fn new(grid: Vec<usize>, tiles: Vec<Tile>) -> Result<Tiling, TilingFault> {
        check(&grid, &tiles)?;
        Ok(Tiling::checked(grid, tiles))
    }

    /// Sorts rectangles that cover a tensor.
    fn checked(grid: Vec<usize>, tiles: Vec<Tile>) -> Tiling {
        let strides = strides(&grid);
        let filled = tiles.into_iter().filter(|tile| !tile.is_empty());
        let mut tiles: Vec<PlacedTile> = filled.map(|tile| PlacedTile::new(tile, &grid, &strides)).collect();
        tiles.sort_by_key(|placed| placed.start);
        let mut reach = 0;
        for placed in &mut tiles {
            reach = placed.reach.max(reach);
            placed.reach = reach;
        }
        Tiling { grid, strides, tiles }
    }

    /// Returns the extents that the rectangles cover.
    pub(crate) fn grid(&self) -> &[usize] {
        &self.grid
    }

    /// Cuts out a rectangle, which becomes a tensor of its own.
    pub(crate) fn region(&self, offset: &[usize], shape: &[usize]) -> Tiling {
        let tiles = self.tiles.iter().filter_map(|placed| placed.tile.within(offset, shape)).collect();
        Tiling::checked(shape.to_vec(), tiles)
    }

    /// Returns a tiling of a list as one of a tensor with as many elements.
    pub(crate) fn unflattened(&self, shape: &[usize]) -> Tiling {
        let mut tiles = Vec::new();
        for PlacedTile { tile, .. } in &self.tiles {
            let mut first = tile.first;
            cut_list(tile.offset[0]..tile.offset[0] + tile.shape[0], shape, &mut |offset, extents| {
                let strides = strides(&extents);
                let count: usize = extents.iter().product();
                tiles.push(Tile { offset, strides, shape: extents, part: tile.part, first });
                first += count;
            });
        }
        Tiling::checked(shape.to_vec(), tiles)
    }

    /// Returns the rectangles among which those are that hold some elements.
    fn near(&self, elements: &Range<usize>) -> &[PlacedTile] {
        let from = self.tiles.partition_point(|placed| placed.reach <= elements.start);
        let until = self.tiles.partition_point(|placed| placed.start < elements.end);
        &self.tiles[from.min(until)..until]
    }

    /// Calls a function with each stretch of a range of elements. It can end the search.
    pub(crate) fn for_each_stretch(
        &self,
        elements: Range<usize>,
        act: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.for_each_rows(elements, &mut |Rows { first, count, stride, part_stride }| {
            (0..count).try_for_each(|i| {
                let elements = first.elements.start + i * stride..first.elements.end + i * stride;
                act(Stretch { part: first.part, elements, first: first.first + i * part_stride })
            })
        })
    }

    /// As [`Tiling::for_each_stretch`], with all stretches at once that follow each other at equal distances.
    pub(crate) fn for_each_rows(
        &self,
        elements: Range<usize>,
        act: &mut dyn FnMut(Rows) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        for placed in self.near(&elements) {
            let row_at = |row| placed.row_at(row, &self.strides);
            let mut row = first_where(placed.rows, |row| row_at(row).0 + placed.row > elements.start);
            while row < placed.rows {
                let (start, first) = row_at(row);
                if start >= elements.end {
                    break;
                }
                let end = start + placed.row;
                let stretch = start.max(elements.start)..end.min(elements.end);
                let first = Stretch { part: placed.tile.part, first: first + stretch.start - start, elements: stretch };
                let mut rows = Rows { first, count: 1, stride: 0, part_stride: 0 };
                if let Some(dim) = placed.rank.checked_sub(1)
                    && start >= elements.start
                    && end <= elements.end
                {
                    rows.stride = self.strides[dim];
                    rows.part_stride = placed.tile.strides[dim];
                    let extent = placed.tile.shape[dim];
                    rows.count = (extent - row % extent).min(1 + (elements.end - end) / rows.stride);
                }
                row += rows.count;
                act(rows)?;
            }
        }
        ControlFlow::Continue(())
    }
}

/// Returns the number of elements of a shape, if there is such a number.
pub(crate) fn volume(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
}

/// Returns the distances of neighbouring elements in C order.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

/// Returns the first of some numbers from 0 on that satisfies a condition, as all after it do; `count` if none does.
fn first_where(count: usize, is_met: impl Fn(usize) -> bool) -> usize {
    let mut range = 0..count;
    while !range.is_empty() {
        let middle = range.start + range.len() / 2;
        if is_met(middle) {
            range.end = middle;
        } else {
            range.start = middle + 1;
        }
    }
    range.start
}

/// Cuts a range of the elements of a tensor into rectangles, in order. Calls `add` with offset and shape of each.
fn cut_list(range: Range<usize>, shape: &[usize], add: &mut dyn FnMut(Vec<usize>, Vec<usize>)) {
    let Some((_, rest)) = shape.split_first().filter(|_| !range.is_empty()) else {
        if !range.is_empty() {
            add(Vec::new(), Vec::new());
        }
        return;
    };
    // Elements of one index along the first dimension.
    let slab: usize = rest.iter().product();
    let in_slab = |index: usize, range: Range<usize>, add: &mut dyn FnMut(Vec<usize>, Vec<usize>)| {
        cut_list(range, rest, &mut |offset, extents| add([&[index], &*offset].concat(), [&[1], &*extents].concat()));
    };
    let first = range.start / slab;
    let last = range.end / slab;
    if first == last {
        return in_slab(first, range.start % slab..range.end % slab, add);
    }
    let whole = range.start.div_ceil(slab)..last;
    if whole.start > first {
        in_slab(first, range.start % slab..slab, add);
    }
    if !whole.is_empty() {
        add([&[whole.start], &*vec![0; rest.len()]].concat(), [&[whole.len()], rest].concat());
    }
    in_slab(last, 0..range.end % slab, add);
}

/// Checks that rectangles cover a tensor, each element once.
fn check(grid: &[usize], tiles: &[Tile]) -> Result<(), TilingFault> {
    let whole = volume(grid).ok_or(TilingFault::TooLarge)?;
    if let Some(outside) = tiles.iter().position(|tile| !tile.fits(grid)) {
        return Err(TilingFault::Outside(outside));
    }
    let mut filled: Vec<usize> = (0..tiles.len()).filter(|&i| !tiles[i].is_empty()).collect();
    // Along the dimension of most cuts, the fewest rectangles are beside each other.
    let cuts = |&dim: &usize| tiles.iter().map(|tile| tile.offset[dim]).collect::<BTreeSet<_>>().len();
    let dim = (0..grid.len()).max_by_key(cuts);
    let range = |i: usize| dim.map_or(0..usize::MAX, |d| tiles[i].offset[d]..tiles[i].offset[d] + tiles[i].shape[d]);
    filled.sort_by_key(|&i| range(i).start);
    for (place, &i) in filled.iter().enumerate() {
        let near = filled[place + 1..].iter().take_while(|&&other| range(other).start < range(i).end);
        if let Some(&other) = near.into_iter().find(|&&other| tiles[i].overlaps(&tiles[other])) {
            return Err(TilingFault::Overlap(i.min(other), i.max(other)));
        }
    }
    let covered =
        filled.iter().fold(0usize, |sum, &i| sum.saturating_add(volume(&tiles[i].shape).unwrap_or(usize::MAX)));
    if covered == whole { Ok(()) } else { Err(TilingFault::Hole { covered, whole }) }
}
