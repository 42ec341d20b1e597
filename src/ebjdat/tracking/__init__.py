"""MLflow behind one small interface: a stage journals what it measures, a publisher brings the journals into MLflow."""
