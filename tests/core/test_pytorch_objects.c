/* test_pytorch_objects.c: what is in a checkpoint of PyTorch's: pickles, the names and values that they give, and
 * tensors. */
#include "pytorch_test.h"

/* ---- pickles ---- */

static void test_opcodes_take_what_is_there(void **unused) {
  (void)unused;
  refuses(BYTES(""), "ends in the middle of a pickled object: it is truncated");
  refuses(BYTES("\x80"), "data.pkl: ends in the middle");
  refuses(BYTES("\x80\6."), "is of a pickle protocol that is not known");
  refuses(BYTES("\x80\1."), "is of a pickle protocol that is not known");
  refuses(BYTES(PROTO "."), "takes a value that is not there (at its byte 2)");
  refuses(BYTES(PROTO "I1\n."), "has an opcode that torch.save does not write (at its byte 2)");
  refuses(BYTES(PROTO "\x85."), "takes a value that is not there");
  refuses(BYTES(PROTO "N(\x85."), "takes a value that is not there");
  refuses(BYTES(PROTO "N(."), "takes a value that is not there");
  refuses(BYTES(PROTO "t."), "looks for a mark that is not there");
  refuses(BYTES(PROTO "u."), "looks for a mark");
  refuses(BYTES(PROTO "1."), "looks for a mark");
  refuses(BYTES(PROTO "0."), "takes a value");
  refuses(BYTES(PROTO "2."), "takes a value");
  refuses(BYTES(PROTO "q\0."), "takes a value");
  refuses(BYTES(PROTO "\x94."), "takes a value");
  refuses(BYTES(PROTO "b."), "takes a value");
  refuses(BYTES(PROTO "Nb."), "takes a value");
  refuses(BYTES(PROTO "Q."), "takes a value");
  refuses(BYTES(PROTO "R."), "takes a value");
  refuses(BYTES(PROTO ")R."), "takes a value");
  refuses(BYTES(PROTO "\x92."), "takes a value");
  refuses(BYTES(PROTO "Na."), "takes a value");
  refuses(BYTES(PROTO "NNs."), "takes a value");
  refuses(BYTES(PROTO "(o."), "makes an object of no class");
  refuses(BYTES(PROTO "o."), "looks for a mark");
  refuses(BYTES(PROTO "\x93."), "takes a value");
  refuses(BYTES(PROTO "NN\x93."), "names a class by what is no text");
  refuses(BYTES(PROTO "NNR."), "calls something with what is no tuple");
  refuses(BYTES(PROTO "h\0."), "refers to an object that is not there");
  refuses(BYTES(PROTO "Nq\5h\4."), "refers to an object that is not there");
  refuses(BYTES(PROTO "(Nd."), "has a key without a value");
  refuses(BYTES(PROTO "}(Nu."), "has a key without a value");
  refuses(BYTES(PROTO "]NNs."), "sets an item of what is no dictionary");
  refuses(BYTES(PROTO "}Na."), "appends to what is no list");
  refuses(BYTES(PROTO "N(Ne."), "appends to what is no list");
  refuses(BYTES(PROTO "X\5\0\0\0abc."), "ends in the middle");
  refuses(BYTES(PROTO "\x8d\xff\xff\xff\xff\xff\xff\xff\xff."), "ends in the middle");
  refuses(BYTES(PROTO "T\xff\xff\xff\xff."), "ends in the middle");
  refuses(BYTES(PROTO "G\0."), "ends in the middle");
  refuses(BYTES(PROTO "\x8a\x09\0."), "ends in the middle");
  refuses(BYTES(PROTO "M\0"), "ends in the middle");
  refuses(BYTES(PROTO "cmodule"), "ends in the middle");
  refuses(BYTES(PROTO "cmodule\nname"), "ends in the middle");
  refuses(BYTES(PROTO "r\0"), "ends in the middle");
  refuses(BYTES(PROTO "j\0"), "ends in the middle");
  refuses(BYTES("\x80\4\x95\0"), "ends in the middle");
}

static void test_claims_of_pickles_cost_nothing(void **unused) {
  (void)unused;
  refuses(BYTES(PROTO "Nr\xff\xff\xff\xff."), "numbers an object higher than there are objects");
  refuses(BYTES(PROTO "Nr\xff\xff\0\0."), "numbers an object higher than there are objects");
  reads_metadata(BYTES(NAMED("Nr\xff\3\0\0")), "null");
}

static void test_plain_values_are_metadata(void **unused) {
  (void)unused;
  reads_metadata(BYTES(NAMED("N")), "null");
  reads_metadata(BYTES(NAMED("\x88")), "true");
  reads_metadata(BYTES(NAMED("J\xfe\xff\xff\xff")), "-2");
  reads_metadata(BYTES(NAMED("M\xff\xff")), "65535");
  reads_metadata(BYTES(NAMED("\x8a\0")), "0");
  reads_metadata(BYTES(NAMED("\x8a\2\0\x80")), "-32768");
  reads_metadata(BYTES(NAMED("\x8b\1\0\0\0\x7f")), "127");
  reads_metadata(BYTES(NAMED("\x8a\x08\0\0\0\0\0\0\0\x80")), "-9223372036854775808");
  reads_metadata(BYTES(NAMED("\x8a\x09\0\0\0\0\0\0\0\x80\0")), "9223372036854775808");
  reads_metadata(BYTES(NAMED("\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\xff")), "-1");
  reads_metadata(BYTES(NAMED("\x8a\x09\0\0\0\0\0\0\0\0\0")), "0");
  reads_metadata(BYTES(NAMED("\x8a\x09\0\0\0\0\0\0\0\0\xff")), "-18446744073709551616");
  reads_metadata(BYTES(NAMED("G?\xf0\0\0\0\0\0\0")), "1.0");
  reads_metadata(BYTES(NAMED("G?\xb9\x99\x99\x99\x99\x99\x9a")), "0.1");
  reads_metadata(BYTES(NAMED("G\x7f\xf0\0\0\0\0\0\0")), "inf");
  reads_metadata(BYTES(NAMED("G\x7f\xf8\0\0\0\0\0\0")), "nan");
  reads_metadata(BYTES(NAMED("U\2hi")), "hi");
  reads_metadata(BYTES(NAMED("T\2\0\0\0hi")), "hi");
  reads_metadata(BYTES(NAMED("C\2hi")), "hi");
  reads_metadata(BYTES(NAMED("X\0\0\0\0")), "");
  reads_metadata(BYTES(NAMED("]")), "[]");
  reads_metadata(BYTES(NAMED("]K\1aX\1\0\0\0\"a")), "[1, \"\\\"\"]");
  reads_metadata(BYTES(NAMED("(K\1Nl")), "[1, null]");
  reads_metadata(BYTES(NAMED("ctorch\nSize\n(K\3K\4t\x85R")), "[3, 4]");
  reads_metadata(BYTES(NAMED("ctorch\ndevice\nX\3\0\0\0cpu\x85R")), "cpu");
  reads_metadata(BYTES(NAMED("ctorch\nbfloat16\n")), "torch.bfloat16");
  reads_metadata(BYTES(NAMED("N0N20(NN1(0q\0")), "null"); /* what is dropped was never there */
}

#define NUMPY(type, bytes) "cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0" type "\x85R" bytes "\x86R"
#define ENCODED(text) "c_codecs\nencode\n" text "X\6\0\0\0latin1\x86R"

static void test_scalars_of_numpy_are_numbers(void **unused) {
  (void)unused;
  reads_metadata(BYTES(NAMED(NUMPY("f8", "C\x08\0\0\0\0\0\0\xf8\xbf"))), "-1.5");
  reads_metadata(BYTES(NAMED(NUMPY("f4", "C\4\0\0\xc0?"))), "1.5");
  reads_metadata(BYTES(NAMED(NUMPY("f4", ENCODED("X\5\0\0\0\0\0\xc3\x80?")))), "1.5");
  reads_metadata(BYTES(NAMED(NUMPY("i8", "C\x08\xff\xff\xff\xff\xff\xff\xff\xff"))), "-1");
  reads_metadata(BYTES(NAMED(NUMPY("i4", "C\4\1\0\0\0"))), "1");
  reads_metadata(BYTES(NAMED(NUMPY("b1", "C\1\0"))), "false");
  static const char kept[] = "w: numpy.core.multiarray.scalar";
  keeps_out(BYTES(NAMED(NUMPY("f8", "C\4\0\0\xc0?"))), kept);
  keeps_out(BYTES(NAMED(NUMPY("f8", "C\x09\0\0\xc0?\0\0\0\0\0"))), kept);
  keeps_out(BYTES(NAMED(NUMPY("f8", "N"))), kept);
  keeps_out(BYTES(NAMED("cnumpy.core.multiarray\nscalar\nN\x85R")), kept);
  keeps_out(BYTES(NAMED("cnumpy.core.multiarray\nscalar\ncnumpy\narray\n)RN\x86R")), kept);
  keeps_out(BYTES(NAMED("cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0f4\x85R(K\3X\1\0\0\0>tb"
                        "C\4\0\0\0\0\x86R")),
            kept); /* big-endian */
}

static void test_what_is_unknown_is_kept_out_by_name(void **unused) {
  (void)unused;
  keeps_out(BYTES(NAMED("cos\nsystem\nX\4\0\0\0exit\x85R")), "w: os.system");
  keeps_out(BYTES(NAMED("cos\nsystem\n")), "w: os.system");
  keeps_out(BYTES(NAMED("(cargparse\nNamespace\no}b")), "w: argparse.Namespace");
  keeps_out(BYTES(NAMED("cargparse\nNamespace\n)\x81}b")), "w: argparse.Namespace");
  keeps_out(BYTES(NAMED("cmine\nThing\n)}\x92]Na0")), "w: mine.Thing");
  keeps_out(BYTES(NAMED("X\4\0\0\0mineX\5\0\0\0Thing\x93)R(K\1e")), "w: mine.Thing"); /* a list with a class */
  keeps_out(BYTES(NAMED("N)R")), "w: None");
  keeps_out(BYTES(NAMED("NQ)R")), "w: an object");
  keeps_out(BYTES(NAMED("C\1\xff")), "w: bytes");
  keeps_out(BYTES(NAMED("U\1\xff")), "w: text that is not UTF-8");
  keeps_out(BYTES(NAMED("U\1\0")), "w: text that is not UTF-8");
  keeps_out(BYTES(NAMED("\x8f(K\1\x90")), "w: a set");
  keeps_out(BYTES(NAMED("(K\1\x91")), "w: a set");
  keeps_out(BYTES(NAMED("ctorch\nstrange\xff\n")), "w: torch.strange?");
  keeps_out(
      BYTES(NAMED("c\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
                  "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
                  "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\nT\n)R")),
      "w: "
      "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
      "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"
      "\xc3\xa9\xc3\xa9\xc3\xa9.T");
  keeps_out(BYTES(NAMED("ctorch\ndevice\nN\x85R")), "w: torch.device");
  keeps_out(BYTES(NAMED("ctorch\ndevice\n)R")), "w: torch.device");
  keeps_out(BYTES(NAMED("ctorch\ndevice\nX\3\0\0\0cpuN\x86R")), "w: torch.device");
  keeps_out(BYTES(NAMED("\x8a\x21\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1\1")),
            "w: a long integer");
  keeps_out(BYTES(NAMED(SIX)), "w: torch.FloatStorage");
  keeps_out(BYTES(PROTO "}(K\1\x85K\1U\1\xffK\2\x88K\3u."), "?: its key is neither text nor an integer\n"
                                                            "?: its key is neither text nor an integer\n"
                                                            "?: its key is neither text nor an integer");
  keeps_out(BYTES(PROTO "]X\1\0\0\0aaU\1\xff"
                        "a."),
            "1: text that is not UTF-8");
  refuses(BYTES(PROTO "cmine\nThing\n)R."), "holds mine.Thing, which is neither a tensor nor a dictionary");
}

static void test_dictionaries_of_any_class_are_walked(void **unused) {
  (void)unused;
  orepa_archive *archive = reads(BYTES(PROTO "ccollections\nOrderedDict\n)R(X\1\0\0\0a" WHOLE "K\7}X\1\0\0\0b" WHOLE
                                             "su}X\x09\0\0\0_metadataNsb."));
  assert_int_equal(orepa_archive_count(archive), 2);
  assert_string_equal(orepa_archive_name(archive, 0), "a");
  assert_string_equal(orepa_archive_name(archive, 1), "7.b");
  assert_int_equal(orepa_archive_metadata_count(archive), 0);
  orepa_archive_free(archive);
  archive = reads(BYTES(PROTO "ccollections\nOrderedDict\n](]U\1aa" WHOLE "a(U\1bK\1te\x85R.")); /* as Python 2 does */
  assert_elements(orepa_archive_find(archive, "a"), six_floats, SIX_BYTES);
  assert_string_equal(orepa_archive_find_metadata(archive, "b"), "1");
  orepa_archive_free(archive);
  refuses(BYTES(PROTO "ccollections\nOrderedDict\n]Na\x85R."), "an OrderedDict in it is not a list of pairs");
  archive = reads(BYTES(NAMED("ceasydict\nEasyDict\n)R(X\1\0\0\0aK\1u")));
  assert_string_equal(orepa_archive_find_metadata(archive, "w.a"), "1");
  orepa_archive_free(archive);
}

static void test_trees_are_bounded(void **unused) {
  (void)unused;
  refuses(BYTES(PROTO "}q\0X\1\0\0\0ah\0s."), "nested more than 100 deep"); /* a dictionary in itself */
  built.size = 0;
  static buffer objects;
  objects.size = 0;
  put_bytes(&objects, BYTES(PROTO "]q\0]a0"));
  for (int k = 0; k < 40; k++) { /* each list holds the one before it twice */
    put_bytes(&objects, BYTES("](h"));
    put_number(&objects, (uint64_t)k, 1);
    put_bytes(&objects, BYTES("h"));
    put_number(&objects, (uint64_t)k, 1);
    put_bytes(&objects, BYTES("eq"));
    put_number(&objects, (uint64_t)k + 1, 1);
  }
  put_bytes(&objects, BYTES("."));
  refuses(objects.bytes, objects.size, "the same objects stand in it again and again");
  static const struct {
    const char *what;
    size_t size;
  } large[] = {{BYTES("X\0\x40\0\0")}, {BYTES("T\0\x40\0\0")}}; /* 16 KiB of text, and of no text, again and again */
  for (int k = 0; k < 2; k++) {
    objects.size = 0;
    put_bytes(&objects, BYTES(PROTO "("));
    put_bytes(&objects, large[k].what, large[k].size);
    for (int n = 0; n < 0x4000; n++)
      put_bytes(&objects, n + 1 < 0x4000 ? "x" : k ? "\xff" : "x", 1);
    put_bytes(&objects, BYTES("q\0"));
    for (int n = 0; n < 2000; n++)
      put_bytes(&objects, BYTES("h\0"));
    put_bytes(&objects, BYTES("}l."));
    refuses(objects.bytes, objects.size, "the same objects stand in it again and again");
  }
  objects.size = 0;
  put_bytes(&objects, BYTES(PROTO "}X\xe9\3\0\0"));
  for (int k = 0; k < 1001; k++)
    put_bytes(&objects, "n", 1);
  put_bytes(&objects, BYTES("K\1s."));
  refuses(objects.bytes, objects.size, "a name in it has more than 1000 bytes");
  refuses(BYTES(PROTO "}(X\1\0\0\0a" WHOLE "U\1a" WHOLE "u."), "there is a tensor \"a\" already");
  refuses(BYTES(PROTO "}X\x0c\0\0\0__metadata__" WHOLE "s."), "a tensor can't be called \"__metadata__\"");
}

/* ---- tensors ---- */

static void test_tensors_are_views_of_storages(void **unused) {
  (void)unused;
  reads_floats(BYTES(NAMED(WHOLE)), 1, (float[]){1, 2, 3, 4, 5, 6}, 6);
  reads_floats(BYTES(NAMED(TENSOR("K\0", "K\2K\3\x86", "K\3K\1\x86"))), 2, (float[]){1, 2, 3, 4, 5, 6}, 6);
  reads_floats(BYTES(NAMED(TENSOR("K\0", "K\3K\2\x86", "K\1K\3\x86"))), 2, (float[]){1, 4, 2, 5, 3, 6}, 6);
  reads_floats(BYTES(NAMED(TENSOR("K\1", "K\2\x85", "K\3\x85"))), 1, (float[]){2, 5}, 2);
  reads_floats(BYTES(NAMED(TENSOR("K\5", ")", ")"))), 0, (float[]){6}, 1);
  reads_floats(BYTES(NAMED(TENSOR("K\2", "K\2K\2\x86", "K\0K\1\x86"))), 2, (float[]){3, 4, 3, 4}, 4);
  reads_floats(BYTES(NAMED(TENSOR("K\0", "K\0\x85", "K\1\x85"))), 1, NULL, 0);
  reads_floats(BYTES(NAMED(TENSOR("K\1", "ctorch\nSize\nK\2\x85\x85R", "K\1\x85"))), 1, (float[]){2, 3}, 2);
  reads_floats(BYTES(NAMED(TENSOR("K\1", "K\1K\1\x86", "\x8a\x08\0\0\0\0\0\0\0\x7fK\x09\x86"))), 2, (float[]){2}, 1);
  reads_floats(BYTES(NAMED("ctorch._utils\n_rebuild_tensor\n(" SIX "K\1K\1\x85K\1\x85tR")), 1, (float[]){2}, 1);
  reads_floats(BYTES(NAMED("ctorch._utils\n_rebuild_parameter\n" WHOLE "\x88N\x87R")), 1, (float[]){1, 2, 3, 4, 5, 6},
               6);
  reads_floats(BYTES(NAMED("ctorch._utils\n_rebuild_parameter_with_state\n(" WHOLE "\x88N}tR")), 1,
               (float[]){1, 2, 3, 4, 5, 6}, 6);
  reads_floats(BYTES(NAMED("ctorch._tensor\n_rebuild_from_type_v2\n(" REBUILD "ctorch\nTensor\n(" SIX
                           "K\0K\1\x85K\1\x85\x89Nt}tR")),
               1, (float[]){1}, 1);
}

static void test_tensors_stay_within_their_storages(void **unused) {
  (void)unused;
  refuses(BYTES(NAMED(TENSOR("K\0", "K\7\x85", "K\1\x85"))),
          "tensor \"w\": 7 with strides 1 at offset 0 reaches beyond its storage of 6 elements");
  refuses(BYTES(NAMED(TENSOR("K\1", "K\6\x85", "K\1\x85"))), "tensor \"w\": 6 with strides 1 at offset 1");
  refuses(BYTES(NAMED(TENSOR("K\0", "K\2K\3\x86", "K\4K\1\x86"))), "2x3 with strides 4x1 at offset 0");
  refuses(BYTES(NAMED(TENSOR("K\6", ")", ")"))), "scalar with strides scalar at offset 6 reaches beyond");
#define HUGE_NUMBER "\x8a\x08\0\0\0\0\0\0\0\x40"
  refuses(BYTES(NAMED(TENSOR(HUGE_NUMBER, "K\1\x85", "K\1\x85"))), "reaches beyond its storage");
  refuses(BYTES(NAMED(TENSOR("K\0", "K\3\x85", HUGE_NUMBER "\x85"))), "reaches beyond its storage");
  refuses(BYTES(NAMED(TENSOR(HUGE_NUMBER, "K\2\x85", HUGE_NUMBER "\x85"))), "reaches beyond its storage");
  refuses(BYTES(NAMED(TENSOR("K\0", HUGE_NUMBER "\x85", "K\0\x85"))), "has more bytes than can be counted");
  refuses(BYTES(NAMED(TENSOR("K\0", "K\0" HUGE_NUMBER "\x86", "K\1K\1\x86"))), "has more bytes than can be counted");
  refuses(BYTES(NAMED(TENSOR("K\0", "J\xff\xff\xff\xff\x85", "K\1\x85"))), "tensor \"w\": its sizes hold -1");
  refuses(BYTES(NAMED(TENSOR("K\0", "K\1\x85", "J\xff\xff\xff\xff\x85"))), "tensor \"w\": its strides hold -1");
  refuses(BYTES(NAMED(TENSOR("K\0", "N\x85", "K\1\x85"))), "its sizes hold what is no integer");
  static const char shape[] = "its offset, sizes and strides are not described as torch.save does it";
  refuses(BYTES(NAMED(TENSOR("J\xff\xff\xff\xff", "K\1\x85", "K\1\x85"))), shape);
  refuses(BYTES(NAMED(TENSOR("N", "K\1\x85", "K\1\x85"))), shape);
  refuses(BYTES(NAMED(TENSOR("K\0", "K\1\x85", ")"))), shape);
  refuses(BYTES(NAMED(TENSOR("K\0", "N", "N"))), shape);
  refuses(BYTES(NAMED(REBUILD "(" SIX "K\0tR")), "tensor \"w\": it has no storage");
  refuses(BYTES(NAMED(TENSOR_OF("N", "K\0", "K\1\x85", "K\1\x85"))), "tensor \"w\": it has no storage");
}

static void test_strides_of_zero_cost_nothing(void **unused) {
  (void)unused;
  orepa_reset_peak(cpu);
  size_t live = orepa_memory(cpu).live;
  refuses(BYTES(NAMED(TENSOR("K\0", "\x8a\6\0\0\0\0\0\1\x85", "K\0\x85"))),
          "with it the tensors would take more than 8 times the file's");
  refuses(BYTES(NAMED(TENSOR("K\0", "J\0\0\x10\0J\0\0\x10\0\x86", "K\0K\0\x86"))),
          "1048576x1048576 has 4398046511104 bytes");
  assert_int_equal(orepa_memory(cpu).peak, live);
}

static void test_storages_are_as_large_as_they_say(void **unused) {
  (void)unused;
#define STORED(type, key, count) BYTES(NAMED(TENSOR_OF(STORAGE(type, key, count), "K\0", "K\1\x85", "K\1\x85")))
  refuses(STORED("FloatStorage", "0", "K\5"), "storage 0 is said to have 20 bytes, and data/0 has 24");
  refuses(STORED("FloatStorage", "0", "K\7"), "storage 0 is said to have 28 bytes, and data/0 has 24");
  refuses(STORED("FloatStorage", "1", "K\6"), "storage 1 is missing: the archive has no data/1");
  refuses(STORED("FloatStorage", "0", "J\xff\xff\xff\xff"), "storage 0 is said to have -1 elements");
  refuses(STORED("FloatStorage", "0", "\x8a\x08\0\0\0\0\0\0\0\x40"), "elements of 4 bytes, the file has");
  refuses(STORED("StrangeStorage", "0", "K\6"), "storage 0 is of an unknown type, torch.StrangeStorage");
  refuses(BYTES(NAMED("(X\7\0\0\0storageNX\1\0\0\0"
                      "0NK\6tQ")),
          "storage 0 is of an unknown type, None");
  refuses(BYTES(NAMED("(X\7\0\0\0storageNNNNtQ")), "a storage is not described as torch.save does it");
  refuses(BYTES(NAMED("(X\7\0\0\0storagetQ")), "a storage is not described as torch.save does it");
  refuses(BYTES(PROTO "]" WHOLE "a" TENSOR_OF(STORAGE("IntStorage", "0", "K\6"), "K\0", ")", ")") "a."),
          "storage 0 is 6 elements of ");
  refuses(BYTES(NAMED("(X\7\0\0\0storagectorch\nFloatStorage\nU\2\xff\nX\3\0\0\0cpuK\6tQ")), "storage ?? is missing");
  orepa_archive *archive = reads(STORED("DoubleStorage", "0", "K\3"));
  assert_int_equal(orepa_tensor_dtype(orepa_archive_find(archive, "w")), OREPA_FLOAT64);
  orepa_archive_free(archive);
  archive = reads(BYTES(NAMED(TENSOR_OF(STORAGE("BoolStorage", "0", "K\x18"), "K\0", "K\2\x85", "K\1\x85"))));
  assert_elements(orepa_archive_find(archive, "w"), "\0\0", 2);
  orepa_archive_free(archive);
  refuses(BYTES(NAMED(TENSOR_OF(STORAGE("BoolStorage", "0", "K\x18"), "K\2", "K\1\x85", "K\1\x85"))),
          "tensor \"w\": element 0 of a BOOL is 128, neither 0 nor 1");
}

static void test_tensors_that_ours_cannot_be_are_kept_out(void **unused) {
  (void)unused;
  keeps_out(STORED("ShortStorage", "0", "K\x0c"), "w: a tensor of torch.ShortStorage");
  keeps_out(STORED("ComplexFloatStorage", "0", "K\3"), "w: a tensor of torch.ComplexFloatStorage");
  keeps_out(BYTES(NAMED(TENSOR("K\0", "(K\1K\1K\1K\1K\1K\1K\1t", "(K\1K\1K\1K\1K\1K\1K\1t"))),
            "w: a tensor of 7 dimensions (at most 6 are supported)");
  keeps_out(BYTES(NAMED(REBUILD "(" SIX "K\0))\x89N}X\3\0\0\0neg\x88stR")),
            "w: a tensor that is to be negated or conjugated");
  keeps_out(BYTES(NAMED("ctorch._utils\n_rebuild_qtensor\n(" SIX "tR")), "w: torch._utils._rebuild_qtensor");
  keeps_out(BYTES(NAMED("ctorch._utils\n_rebuild_parameter\n)R")), "w: torch._utils._rebuild_parameter");
  keeps_out(BYTES(NAMED("ctorch._tensor\n_rebuild_from_type_v2\n(NNNNtR")), "w: torch._tensor._rebuild_from_type_v2");
}

static void test_modules_are_read_as_their_state(void **unused) {
  (void)unused;
#define PART(name, items) "X\x0b\0\0\0" name "}(" items "u"
  orepa_archive *archive = reads(BYTES(PROTO "cmine\nNet\n)\x81}(" PART(
      "_parameters",
      "X\1\0\0\0wctorch._utils\n_rebuild_parameter\n" WHOLE
      "\x88N\x87RX\1\0\0\0bN") "X\x08\0\0\0_buffers}X\1\0\0\0r" WHOLE
                               "sX\x08\0\0\0_modules}X\1\0\0\0mcmine\nInner\n)\x81}(" PART(
                                   "_parameters",
                                   "X\1\0\0\0v" WHOLE) "X\x08\0\0\0_modules}ubsX\x08\0\0\0trainingK\1ub."));
  assert_int_equal(orepa_archive_count(archive), 3);
  assert_string_equal(orepa_archive_name(archive, 0), "w");
  assert_string_equal(orepa_archive_name(archive, 1), "r");
  assert_string_equal(orepa_archive_name(archive, 2), "m.v");
  assert_int_equal(orepa_archive_metadata_count(archive), 0);
  orepa_archive_free(archive);
}

/* ---- memory ---- */

static void test_without_memory_nothing_is_left(void **unused) {
  (void)unused;
  enum { COUNT_OF_FLOATS = 1 << 17 };
  static const char object[] = NAMED(TENSOR("K\0", "J\0\0\2\0\x85", "K\0\x85"));
  const char *path;
  put_checkpoint(&built, object, sizeof object - 1);
  path = write_bytes("a.pth", built.bytes, built.size);
  orepa_empty_cache(cpu);
  size_t live = orepa_memory(cpu).live;
  orepa_set_memory_limit(cpu, live + COUNT_OF_FLOATS * sizeof(float) / 2);
  orepa_archive *archive = orepa_load_pytorch(path, cpu);
  bool memory = orepa_error_is_out_of_memory();
  orepa_set_memory_limit(cpu, 0);
  assert_refused(!archive, path, "tensor \"w\": out of memory: ");
  assert_true(memory);
  assert_int_equal(orepa_memory(cpu).live, live);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_opcodes_take_what_is_there),
      IO_TEST(test_claims_of_pickles_cost_nothing),
      IO_TEST(test_plain_values_are_metadata),
      IO_TEST(test_scalars_of_numpy_are_numbers),
      IO_TEST(test_what_is_unknown_is_kept_out_by_name),
      IO_TEST(test_dictionaries_of_any_class_are_walked),
      IO_TEST(test_trees_are_bounded),
      IO_TEST(test_tensors_are_views_of_storages),
      IO_TEST(test_tensors_stay_within_their_storages),
      IO_TEST(test_strides_of_zero_cost_nothing),
      IO_TEST(test_storages_are_as_large_as_they_say),
      IO_TEST(test_tensors_that_ours_cannot_be_are_kept_out),
      IO_TEST(test_modules_are_read_as_their_state),
      IO_TEST(test_without_memory_nothing_is_left),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
