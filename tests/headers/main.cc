// The check is that everything compiled and links (an inline function without `inline` would be
// defined twice).
int main() { return 0; }
