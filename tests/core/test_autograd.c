/* test_autograd.c: the graph: recording, the backward pass, accumulation, freeing, and what is refused. In-place ops
 * have a file of their own (test_in_place.c), and so have views (test_view.c) and very long graphs (test_long_graph.c).
 */
#include "engine_test.h"

#include <pthread.h>

#include "autograd/autograd.h"

/* Backward of sum(t); t is given back. */
static void backward(orepa_tensor *t) {
  orepa_tensor *sum = sum_of(t);
  done(orepa_backward(sum, NULL, false));
  RELEASE(t, sum);
}

/* ---- an op of the tests': y = x, as x's own memory, with a look around when its gradient passes ---- */

static struct {
  int visits;
  size_t live;    /* bytes in use at the last visit */
  double sum;     /* of the gradient that arrived last */
  int disposed;   /* payloads given back */
  bool recording; /* whether ops recorded a graph during the visit */
} seen;

static int probe_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  orepa_tensor *sum = sum_of(dy);
  seen.visits++;
  seen.live = orepa_memory_live();
  seen.recording = orepa_grad_enabled();
  done(orepa_item(sum, &seen.sum));
  orepa_release(sum);
  if (autograd_needs(node, 0))
    dx[0] = orepa_retain(dy);
  return 0;
}

static void probe_dispose(void *payload) {
  (void)payload;
  seen.disposed++;
}

static const autograd_op probe_op = {"probe", probe_backward, probe_dispose};

static orepa_tensor *probe(orepa_tensor *x) {
  orepa_tensor *y = must(orepa_detach(x));
  autograd_node *node;
  done(autograd_record(&probe_op, y, &x, 1, 0, 1, &node));
  return y;
}

static int begin(void **unused) {
  (void)unused;
  memset(&seen, 0, sizeof seen);
  return !orepa_grad_enabled();
}

#define TEST(function) cmocka_unit_test_setup(function, begin)

/* ---- what is recorded ---- */

static void test_results_require_what_their_inputs_require(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(2), 3)), *c = full(CPU, SHAPE(2), 2);
  orepa_tensor *y = must(orepa_mul(x, c)), *z = must(orepa_mul(c, c)), *bits = must(orepa_to(y, OREPA_INT64, CPU));
  assert_true(orepa_requires_grad(y) && !orepa_is_leaf(y));
  assert_true(!orepa_requires_grad(z) && orepa_is_leaf(z));
  assert_true(!orepa_requires_grad(bits) && orepa_is_leaf(bits)); /* integers have no gradients */
  assert_refused(orepa_set_requires_grad(y, false), "(float32 2) was computed by 'mul'; only a leaf");
  assert_refused(orepa_set_requires_grad(bits, true), "int64 has no gradients");
  done(orepa_set_requires_grad(x, false));
  assert_true(orepa_requires_grad(y)); /* what was recorded stays */
  RELEASE(x, c, y, z, bits);
}

static void test_no_grad_nests_and_is_restored(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(2), 3)), *w = wanting(full(CPU, SHAPE(3), 1));
  assert_true(orepa_set_grad_enabled(false));
  assert_false(orepa_set_grad_enabled(false));
  orepa_tensor *y = must(orepa_mul(x, x));
  assert_false(orepa_requires_grad(y));
  assert_false(orepa_set_grad_enabled(false)); /* the inner one's end */
  assert_false(orepa_grad_enabled());
  double three;
  orepa_tensor *one = must(orepa_select(x, 0, 0));
  done(orepa_item(one, &three)); /* these switch recording off and back to what it was */
  assert_refused(orepa_backward(y, NULL, false), "backward");
  assert_false(orepa_set_grad_enabled(true));
  orepa_tensor *z = must(orepa_mul(x, x));
  assert_true(orepa_requires_grad(z)); /* and failures restore it as well */
  assert_no_tensor(orepa_concatenate(2, (orepa_tensor *[]){x, one}, 0), "concatenate");
  assert_refused(orepa_copy_(y, w), "3 does not broadcast to 2");
  assert_refused(orepa_backward(z, one, false), "backward");
  assert_true(orepa_grad_enabled());
  RELEASE(x, w, y, z, one);
}

static void *grad_enabled_at_first(void *unused) {
  (void)unused;
  bool on = orepa_grad_enabled();
  orepa_set_grad_enabled(false);
  return on ? NULL : (void *)1;
}

static void test_no_grad_is_a_threads_own(void **unused) {
  (void)unused;
  bool was = orepa_set_grad_enabled(false);
  pthread_t thread;
  void *wrong;
  assert_int_equal(pthread_create(&thread, NULL, grad_enabled_at_first, NULL), 0);
  assert_int_equal(pthread_join(thread, &wrong), 0);
  assert_null(wrong);
  assert_false(orepa_set_grad_enabled(was));
}

static void test_backward_records_nothing(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(2), 3)), *p = probe(x);
  backward(must(orepa_mul(p, p)));
  assert_true(seen.visits == 1 && !seen.recording && orepa_grad_enabled());
  assert_true(!orepa_requires_grad(orepa_grad(x)) && orepa_is_leaf(orepa_grad(x)));
  RELEASE(x, p);
}

/* ---- gradients ---- */

static void test_gradients_accumulate_until_they_are_removed(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(3), 1));
    assert_null(orepa_grad(x));
    backward(must(orepa_mul(x, x)));
    assert_values(orepa_grad(x), 2, 4, 6);
    backward(must(orepa_mul(x, x)));
    backward(must(orepa_relu(x)));
    assert_values(orepa_grad(x), 5, 9, 13);
    done(orepa_set_grad(x, NULL));
    assert_null(orepa_grad(x));
    backward(must(orepa_relu(x)));
    assert_values(orepa_grad(x), 1, 1, 1);
    orepa_release(x);
  }
}

/* The pass never adds into memory that somebody else sees. */
static void test_a_gradient_is_memory_of_its_own(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(2), 1)), *w = wanting(numbered(device, SHAPE(2), 1));
    orepa_tensor *dy = full(device, SHAPE(2), 5), *y = must(orepa_add(x, w)), *z = must(orepa_add(y, x));
    done(orepa_backward(z, dy, false));
    assert_values(orepa_grad(x), 10, 10);
    assert_values(orepa_grad(w), 5, 5);
    assert_values(dy, 5, 5);
    assert_false(orepa_shares_storage(orepa_grad(x), orepa_grad(w)));
    assert_false(orepa_shares_storage(orepa_grad(x), dy) || orepa_shares_storage(orepa_grad(w), dy));
    done(orepa_backward(x, dy, false)); /* of a leaf: its own gradient */
    assert_values(orepa_grad(x), 15, 15);
    assert_values(dy, 5, 5);
    orepa_tensor *a = wanting(numbered(device, SHAPE(2), 1)), *b = wanting(numbered(device, SHAPE(2), 1));
    orepa_tensor *both = must(orepa_add(a, b));
    backward(must(orepa_relu(both))); /* one gradient, made by the pass, for both */
    assert_false(orepa_shares_storage(orepa_grad(a), orepa_grad(b)));
    backward(must(orepa_relu(a)));
    assert_values(orepa_grad(a), 2, 2);
    assert_values(orepa_grad(b), 1, 1);
    RELEASE(x, w, dy, y, z, a, b, both);
  }
}

/* Also where the gradient that arrives is a view of what the pass has made. */
static void test_a_gradient_is_contiguous(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(2, 3), 1)), *turned = must(orepa_transpose(x, 0, 1));
    backward(must(orepa_mul(turned, turned)));
    assert_strides(orepa_grad(x), 3, 1);
    assert_values(orepa_grad(x), 2, 4, 6, 8, 10, 12);
    RELEASE(x, turned);
  }
}

static void test_a_gradient_has_the_leafs_type_order_and_device(void **unused) {
  (void)unused;
  static const orepa_dtype shorts[] = {OREPA_BFLOAT16, OREPA_FLOAT16, OREPA_FLOAT32, OREPA_FLOAT64};
  for (int k = 0; k < 4; k++) {
    orepa_tensor *x = wanting(must(orepa_full(shorts[k], REF, SHAPE(2, 3, 2, 2), 2)));
    orepa_tensor *wide = must(orepa_to(x, OREPA_FLOAT32, CPU)), *turned = must(orepa_permute(wide, AXES(3, 2, 0, 1)));
    orepa_tensor *y = must(orepa_mul(turned, turned)), *dy = numbered(CPU, SHAPE(2, 2, 2, 3), 0);
    for (int pass = 1; pass <= 2; pass++) {
      done(orepa_backward(y, dy, pass == 1));
      orepa_tensor *grad = orepa_grad(x);
      assert_int_equal(orepa_tensor_dtype(grad), shorts[k]);
      assert_ptr_equal(orepa_tensor_device(grad), REF);
      assert_shape(grad, 2, 3, 2, 2);
      assert_strides(grad, 12, 1, 6, 3);
      double values[24];
      read_values(grad, values);
      for (int n = 0; n < 2; n++)
        for (int c = 0; c < 3; c++)
          for (int p = 0; p < 4; p++) /* pixel h = p / 2, w = p % 2 */
            assert_true(values[(n * 3 + c) * 4 + p] == 4 * pass * (12 * (p % 2) + 6 * (p / 2) + 3 * n + c));
    }
    RELEASE(x, wide, turned, y, dy);
  }
}

static void test_short_and_long_floats_mix_in_one_graph(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(must(orepa_full(OREPA_BFLOAT16, CPU, SHAPE(2), 3)));
  orepa_tensor *b = wanting(full(CPU, SHAPE(2), 0.3)), *y = must(orepa_mul(a, b));
  assert_int_equal(orepa_tensor_dtype(y), OREPA_FLOAT32);
  backward(y);
  assert_int_equal(orepa_tensor_dtype(orepa_grad(a)), OREPA_BFLOAT16);
  assert_values(orepa_grad(a), 0.30078125, 0.30078125); /* 0.3 to nearest */
  assert_int_equal(orepa_tensor_dtype(orepa_grad(b)), OREPA_FLOAT32);
  assert_values(orepa_grad(b), 3, 3);
  RELEASE(a, b);
}

static void test_set_grad_takes_what_fits_only(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(2, 3), 1)), *g = numbered(CPU, SHAPE(3, 2), 0);
  orepa_tensor *turned = must(orepa_transpose(g, 0, 1)), *away = full(REF, SHAPE(2, 3), 1);
  orepa_tensor *wide = must(orepa_full(OREPA_FLOAT64, CPU, SHAPE(2, 3), 1)), *one = full(CPU, SHAPE(1, 1), 2);
  orepa_tensor *same = must(orepa_expand(one, SHAPE(2, 3)));
  assert_refused(orepa_set_grad(x, g), "a gradient of float32 3x2 for a tensor of float32 2x3");
  assert_refused(orepa_set_grad(x, wide), "a gradient of float64 2x3 for a tensor of float32 2x3");
  assert_refused(orepa_set_grad(x, away), "gradient");
  assert_null(orepa_grad(x));
  done(orepa_set_grad(x, turned)); /* any strides; what is kept is contiguous, and the pass can add to it */
  assert_true(orepa_is_contiguous(orepa_grad(x)));
  backward(must(orepa_relu(x)));
  assert_values(orepa_grad(x), 1, 3, 5, 2, 4, 6);
  done(orepa_set_grad(x, same));
  backward(must(orepa_relu(x)));
  assert_values(orepa_grad(x), 3, 3, 3, 3, 3, 3);
  assert_values(one, 2);
  RELEASE(x, g, turned, away, wide, one, same);
}

/* A leaf that moved after the forward pass gets its gradient where it is now. */
static void test_a_leaf_that_moved_gets_its_gradient_there(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *y = must(orepa_mul(x, x));
  done(orepa_move_(x, OREPA_FLOAT32, REF));
  backward(y);
  assert_ptr_equal(orepa_tensor_device(orepa_grad(x)), REF);
  assert_values(orepa_grad(x), 2, 4);
  y = must(orepa_mul(x, x));
  done(orepa_move_(x, OREPA_FLOAT64, CPU));
  backward(y);
  assert_int_equal(orepa_tensor_dtype(orepa_grad(x)), OREPA_FLOAT64);
  assert_ptr_equal(orepa_tensor_device(orepa_grad(x)), CPU);
  assert_values(orepa_grad(x), 4, 8);
  orepa_release(x);
}

/* ---- the shape of graphs ---- */

/* y = d(x)·b(x) of one node p over x: all of p's gradient has arrived when p is visited, and it is visited once. */
static void test_a_diamond_visits_each_node_once(void **unused) {
  (void)unused;
  for_each_device(device) {
    memset(&seen, 0, sizeof seen);
    orepa_tensor *x = wanting(numbered(device, SHAPE(3), 1)), *p = probe(x);
    orepa_tensor *left = must(orepa_relu(p)), *longer = must(orepa_mul(p, p)), *right = must(orepa_mul(longer, p));
    orepa_tensor *y = must(orepa_add(left, right)), *z = must(orepa_add(y, p)); /* p + p^3 + p */
    backward(z);
    assert_int_equal(seen.visits, 1);
    assert_true(seen.sum == 3 * 2 + 3 * (1 + 4 + 9));
    assert_values(orepa_grad(x), 5, 14, 29);
    RELEASE(x, p, left, longer, right, y);
  }
}

/* Forty layers of diamonds have 2^40 paths. */
static void test_paths_may_be_many(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(1), 1)), *p = probe(x), *y = orepa_retain(p);
  for (int layer = 0; layer < 40; layer++) {
    orepa_tensor *next = must(orepa_add(y, y));
    orepa_release(y);
    y = next;
  }
  backward(y);
  assert_int_equal(seen.visits, 1);
  assert_values(orepa_grad(x), 0x1p40);
  RELEASE(x, p);
}

static void test_shared_parameters_get_the_sum(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = numbered(device, SHAPE(2, 3), 1), *w = wanting(numbered(device, SHAPE(3, 3), 0));
    orepa_tensor *y = must(orepa_linear(x, w, NULL)), *z = must(orepa_linear(y, w, NULL)); /* twice, and once alone */
    orepa_tensor *both = must(orepa_mul(w, w)), *sums[2] = {sum_of(z), sum_of(both)};
    orepa_tensor *loss = must(orepa_add(sums[0], sums[1]));
    done(orepa_backward(loss, NULL, false));
    double w0[9], x0[6], found[9], y0[6] = {0}, columns[3] = {0};
    read_values(w, w0);
    read_values(x, x0);
    read_values(orepa_grad(w), found);
    for (int n = 0; n < 6; n++)
      for (int k = 0; k < 3; k++)
        y0[n] += x0[n / 3 * 3 + k] * w0[n % 3 * 3 + k];
    for (int k = 0; k < 9; k++)
      columns[k % 3] += w0[k];
    for (int o = 0; o < 3; o++)
      for (int i = 0; i < 3; i++) /* of z: y[.,i]; of y: columns[o]*x[.,i]; of w*w: 2w */
        assert_true(found[o * 3 + i] == y0[i] + y0[3 + i] + columns[o] * (x0[i] + x0[3 + i]) + 2 * w0[o * 3 + i]);
    RELEASE(x, w, y, z, both, sums[0], sums[1], loss);
  }
}

static void test_more_inputs_than_a_node_has_room_for_at_hand(void **unused) {
  (void)unused;
  enum { COUNT = 40 };
  orepa_tensor *parts[COUNT];
  for (int k = 0; k < COUNT; k++)
    parts[k] = k % 3 ? wanting(full(CPU, SHAPE(1 + k % 2, 2), k)) : full(CPU, SHAPE(1 + k % 2, 2), k);
  orepa_tensor *y = must(orepa_concatenate(COUNT, parts, 0)), *square = must(orepa_mul(y, y));
  backward(square);
  for (int k = 0; k < COUNT; k++) {
    if (k % 3 == 0) {
      assert_null(orepa_grad(parts[k]));
    } else {
      double values[4];
      read_values(orepa_grad(parts[k]), values);
      assert_true(values[0] == 2 * k && values[2 * (k % 2) + 1] == 2 * k);
    }
  }
  release_all(COUNT, parts);
  orepa_release(y);
}

/* ---- the graph's life ---- */

static void test_a_second_backward_needs_retain_graph(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *y = must(orepa_mul(x, x)), *sum = sum_of(y);
  done(orepa_backward(sum, NULL, true));
  done(orepa_backward(sum, NULL, true));
  done(orepa_backward(sum, NULL, false));
  assert_values(orepa_grad(x), 6, 12);
  assert_refused(orepa_backward(sum, NULL, false), "the graph behind 'sum' was freed by an earlier backward");
  assert_refused(orepa_backward(sum, NULL, true), "retain_graph");
  orepa_tensor *later = must(orepa_add(y, y)); /* built on what was freed */
  assert_refused(orepa_backward(later, y, false), "the graph behind 'mul' was freed");
  assert_values(orepa_grad(x), 6, 12);
  RELEASE(x, y, sum, later);
}

enum { DEEP = 24, PIECE = 1 << 18 /* elements: a MiB of float32 */ };

/* exp of exp of ... with a probe next to the leaf; the last result. Each step saves a MiB. */
static orepa_tensor *deep_graph(orepa_tensor *x) {
  orepa_tensor *y = probe(x);
  for (int k = 0; k < DEEP; k++) {
    orepa_tensor *next = must(orepa_apply(orepa_function_by_name("sqrt"), &(orepa_operand){.tensor = y}));
    orepa_release(y);
    y = next;
  }
  return y;
}

/* What the nodes saved is given back as the pass goes: at its end next to nothing is left of 24 MiB. */
static void test_backward_frees_the_graph_on_its_way(void **unused) {
  (void)unused;
  const size_t start = orepa_memory_live(), mib = 4 * PIECE;
  orepa_tensor *x = wanting(full(CPU, SHAPE(PIECE), 1)), *dy = full(CPU, SHAPE(PIECE), 1);
  for (int retain = 1; retain >= 0; retain--) {
    orepa_tensor *y = deep_graph(x);
    size_t before = orepa_memory_live();
    assert_true(before >= start + (DEEP + 2) * mib);
    done(orepa_backward(y, dy, retain));
    assert_int_equal(seen.visits, 2 - retain);
    if (retain)
      assert_true(seen.live >= before);
    else
      assert_true(seen.live <= start + 7 * mib);     /* x, its gradient, dy, y and what the pass holds */
    assert_int_equal(seen.disposed, retain ? 0 : 2); /* the first one's at its release */
    orepa_release(y);
    assert_int_equal(seen.disposed, retain ? 1 : 2);
  }
  RELEASE(x, dy);
  assert_int_equal(orepa_memory_live(), start);
}

static void test_a_graph_that_nobody_runs_is_freed(void **unused) {
  (void)unused;
  const size_t start = orepa_memory_live();
  orepa_tensor *x = wanting(full(CPU, SHAPE(PIECE), 1)), *y = deep_graph(x), *z = must(orepa_mul(y, y));
  orepa_release(x); /* the graph holds the leaf */
  assert_true(orepa_memory_live() > start + DEEP * 4 * PIECE);
  orepa_release(y);
  assert_int_equal(seen.disposed, 0);
  orepa_release(z);
  assert_true(seen.disposed == 1 && seen.visits == 0);
  assert_int_equal(orepa_memory_live(), start);
}

/* Every kind of end: a pass, two, none, one that failed; and graphs that share nodes. */
static void test_live_bytes_return_to_the_start(void **unused) {
  (void)unused;
  for_each_device(device) {
    const size_t start = orepa_memory(device).live;
    orepa_tensor *x = wanting(numbered(device, SHAPE(4, 5), 1)), *w = wanting(numbered(device, SHAPE(5, 5), 1));
    for (int way = 0; way < 5; way++) {
      orepa_tensor *y = must(orepa_linear(x, w, NULL)), *shared = must(orepa_relu(y)), *a = sum_of(shared);
      orepa_tensor *b = must(orepa_reduce(OREPA_MAX, shared, 0, NULL, false)), *v = must(orepa_transpose(shared, 0, 1));
      orepa_tensor *c = must(orepa_mul(v, v));
      if (way == 1 || way == 2)
        done(orepa_backward(a, NULL, way == 2));
      if (way == 1)
        assert_refused(orepa_backward(b, NULL, false), "freed");
      if (way == 2)
        done(orepa_backward(b, NULL, false));
      if (way == 3)
        assert_refused(orepa_backward(c, NULL, false), "5x4 needs the gradient to start from");
      if (way == 4) {
        bool was = orepa_set_grad_enabled(false);
        done(orepa_fill_(w, 1));
        orepa_set_grad_enabled(was);
        assert_refused(orepa_backward(a, NULL, false), "matmul: backward needs");
      }
      RELEASE(y, shared, a, b, v, c);
    }
    RELEASE(x, w);
    assert_int_equal(orepa_memory(device).live, start);
  }
}

/* A pass that fails half way leaves nothing behind that a later one would count. */
static void test_a_failed_pass_leaves_no_gradient_behind(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *c = full(CPU, SHAPE(2), 2), *p = probe(x);
  orepa_tensor *bad = must(orepa_mul(p, c)), *good = must(orepa_add(p, p)), *y = must(orepa_add(good, bad));
  done(orepa_fill_(c, 5)); /* the older of the two branches fails, after the other gave p a gradient */
  assert_refused(orepa_backward(y, c, true), "mul: backward needs a tensor (float32 2) that was changed in place");
  assert_int_equal(seen.visits, 0);
  done(orepa_backward(good, c, false));
  assert_true(seen.visits == 1 && seen.sum == 20);
  assert_values(orepa_grad(x), 10, 10);
  RELEASE(x, c, p, bad, good, y);
}

/* ---- what is refused ---- */

static void test_backward_refuses_what_it_can_not_start_from(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(full(device, SHAPE(2, 3), 1)), *c = full(device, SHAPE(2, 3), 1);
    orepa_tensor *y = must(orepa_mul(x, x)), *flat = full(device, SHAPE(6), 1),
                 *none = must(orepa_slice(y, 0, 1, 1, 1));
    orepa_tensor *wide = must(orepa_full(OREPA_FLOAT64, device, SHAPE(2, 3), 1));
    orepa_tensor *away = full(device == CPU ? REF : CPU, SHAPE(2, 3), 1);
    assert_refused(orepa_backward(y, NULL, false), "a tensor of 2x3 needs the gradient to start from");
    assert_refused(orepa_backward(none, NULL, false), "a tensor of 0x3 needs the gradient to start from");
    assert_refused(orepa_backward(c, NULL, false), "nothing that this tensor (float32 2x3) was computed from requires");
    assert_refused(orepa_backward(c, c, false), "requires a gradient");
    assert_refused(orepa_backward(y, flat, false), "the gradient is float32 6 on");
    assert_refused(orepa_backward(y, wide, false), "the gradient is float64 2x3 on");
    assert_refused(orepa_backward(y, away, false), "the tensor float32 2x3 on");
    assert_null(orepa_grad(x));
    done(orepa_backward(y, c, false)); /* none of these freed the graph */
    assert_values(orepa_grad(x), 2, 2, 2, 2, 2, 2);
    RELEASE(x, c, y, flat, none, wide, away);
  }
}

/* A single number needs no gradient, whatever its rank. */
static void test_a_single_number_starts_from_one(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(1, 1, 1), 3)), *y = must(orepa_mul(x, x));
  done(orepa_backward(y, NULL, false));
  assert_values(orepa_grad(x), 6);
  RELEASE(x, y);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_results_require_what_their_inputs_require),
      TEST(test_no_grad_nests_and_is_restored),
      TEST(test_no_grad_is_a_threads_own),
      TEST(test_backward_records_nothing),
      TEST(test_gradients_accumulate_until_they_are_removed),
      TEST(test_a_gradient_is_memory_of_its_own),
      TEST(test_a_gradient_is_contiguous),
      TEST(test_a_gradient_has_the_leafs_type_order_and_device),
      TEST(test_short_and_long_floats_mix_in_one_graph),
      TEST(test_set_grad_takes_what_fits_only),
      TEST(test_a_leaf_that_moved_gets_its_gradient_there),
      TEST(test_a_diamond_visits_each_node_once),
      TEST(test_paths_may_be_many),
      TEST(test_shared_parameters_get_the_sum),
      TEST(test_more_inputs_than_a_node_has_room_for_at_hand),
      TEST(test_a_second_backward_needs_retain_graph),
      TEST(test_backward_frees_the_graph_on_its_way),
      TEST(test_a_graph_that_nobody_runs_is_freed),
      TEST(test_live_bytes_return_to_the_start),
      TEST(test_a_failed_pass_leaves_no_gradient_behind),
      TEST(test_backward_refuses_what_it_can_not_start_from),
      TEST(test_a_single_number_starts_from_one),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
