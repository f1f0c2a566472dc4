-- Answers: which archived products say how this MOUS was calibrated?
-- Bind:    :mous_uid, as uid://A001/X12a3/X80e
-- Columns: NGAS_FILE_ID  the name of the file in the archive
--          VERSION       optional: its version, number or text; a site whose archive records one adds the column
-- Rows:    one for each file; together they identify the calibration.
SELECT DISTINCT
    product.NGAS_FILE_ID
FROM ALMA.ASA_PRODUCT_FILES product
WHERE product.ASA_OUS_ID = :mous_uid
    AND product.FILE_CLASS IN ('calibration', 'script')
